"""Convert to an ONNX file that ONNX Runtime executes on integers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import onnx
import onnx_ir as ir
import onnxruntime
import torch
from torch import Tensor, fx

from fxmpq.graph.batches import Batch, flat_inputs
from fxmpq.graph.rules import TargetRules
from fxmpq.targets.onnx_compact import compact
from fxmpq.targets.onnx_export import check_size, export_onnx, write_onnx
from fxmpq.targets.onnx_parts import onnx_parts
from fxmpq.targets.onnxruntime.exposure import ExposedModel
from fxmpq.targets.onnxruntime.float_layers import keep_float_layers
from fxmpq.targets.onnxruntime.kernels import ExecutedKernels
from fxmpq.targets.onnxruntime.layer_nodes import WrittenModel, layer_nodes
from fxmpq.targets.onnxruntime.layout import lay_out_weights
from fxmpq.targets.onnxruntime.rewrite import to_integer_operators
from fxmpq.targets.onnxruntime.rewrite_products import name_products, products_of
from fxmpq.targets.onnxruntime.session import OnnxModel
from fxmpq.targets.onnxruntime.storage import narrow_codes
from fxmpq.targets.onnxruntime.stored_weights import dequantize_when_loaded
from fxmpq.targets.onnxruntime.translate import TRANSLATIONS
from fxmpq.targets.onnxruntime.versions import check_release
from fxmpq.targets.outcome import layer_reports
from fxmpq.targets.target import Converted, LayerValue

_OPSET = 21


def convert_onnxruntime(
    graph: fx.GraphModule, output: Path | None, rules: TargetRules
) -> Converted:
    """Write a quantized ONNX model, check it, load it, and read back the kernels it runs.

    Args:
        graph: With chosen precisions; not changed.
        output: Folder to write `model.onnx` to, made if missing.
        rules: The target's.

    Returns:
        The converted model; its `module` is an `OnnxModel`.

    Raises:
        TargetError: If torch's ONNX exporter has no translation for a node, naming it, one file
            cannot hold the model, or the installed runtime is too old for it.
    """
    rewritten = to_integer_operators(graph, rules)
    model = export_onnx(rewritten, TRANSLATIONS, _OPSET)
    name_products(model, list(products_of(graph).values()))
    dequantize_when_loaded(model)
    keep_float_layers(model)
    lay_out_weights(model)
    narrow_codes(model)
    proto = ir.to_proto(model)
    check_size(proto)
    compact(proto, layer_nodes(WrittenModel(proto), graph))
    written = WrittenModel(proto)
    onnx.checker.check_model(proto)
    check_release(proto, onnxruntime.__version__)
    serialized = proto.SerializeToString()
    threads = torch.get_num_threads()
    loaded = OnnxModel(serialized, threads)
    files = () if output is None else (write_onnx(serialized, output),)

    def run(batch: Batch) -> Sequence[Tensor]:
        return loaded(flat_inputs(graph, batch))

    @cache
    def exposed() -> ExposedModel:
        return ExposedModel(graph, serialized, loaded, threads)

    def layer_values(batch: Batch) -> Sequence[LayerValue]:
        return exposed()(batch)

    kernels = ExecutedKernels(loaded.executed, written, graph)
    reports = layer_reports(graph, kernels.quantized, kernels.in_float)
    return Converted(
        "onnxruntime",
        run,
        loaded,
        files,
        reports,
        layer_values=layer_values,
        parts=onnx_parts(proto, graph),
    )
