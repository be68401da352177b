"""Convert to an ONNX file that ONNX Runtime executes on integers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import onnx
import onnx_ir as ir
import torch
from torch import Tensor, fx

from fxmpq.errors import TargetError
from fxmpq.graph.batches import Batch, flat_inputs
from fxmpq.graph.export import quiet_torch
from fxmpq.graph.rules import TargetRules
from fxmpq.targets.onnxruntime.exportable import make_exportable
from fxmpq.targets.onnxruntime.exposure import ExposedModel
from fxmpq.targets.onnxruntime.float_layers import keep_float_layers
from fxmpq.targets.onnxruntime.kernels import ExecutedKernels
from fxmpq.targets.onnxruntime.layer_nodes import WrittenModel
from fxmpq.targets.onnxruntime.layout import lay_out_weights
from fxmpq.targets.onnxruntime.rewrite import to_integer_operators
from fxmpq.targets.onnxruntime.rewrite_products import name_products, products_of
from fxmpq.targets.onnxruntime.session import OnnxModel
from fxmpq.targets.onnxruntime.storage import narrow_codes
from fxmpq.targets.onnxruntime.stored_weights import dequantize_when_loaded
from fxmpq.targets.onnxruntime.translate import TRANSLATIONS
from fxmpq.targets.outcome import layer_reports
from fxmpq.targets.program import rewritten_program
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
        TargetError: If torch's ONNX exporter has no translation for a node, naming it.
    """
    rewritten = to_integer_operators(graph, rules)
    model = _export(rewritten)
    _drop_notes(model)
    name_products(model, list(products_of(graph).values()))
    dequantize_when_loaded(model)
    keep_float_layers(model)
    lay_out_weights(model)
    narrow_codes(model)
    proto = ir.to_proto(model)
    written = WrittenModel(proto)
    _drop_constant_shapes(proto, written)
    onnx.checker.check_model(proto)
    serialized = proto.SerializeToString()
    threads = torch.get_num_threads()
    loaded = OnnxModel(serialized, threads)
    files = () if output is None else (_write(serialized, output),)

    def run(batch: Batch) -> Sequence[Tensor]:
        return loaded(flat_inputs(graph, batch))

    @cache
    def exposed() -> ExposedModel:
        return ExposedModel(graph, serialized, loaded, threads)

    def layer_values(batch: Batch) -> Sequence[LayerValue]:
        return exposed()(batch)

    kernels = ExecutedKernels(loaded.executed, written, graph)
    reports = layer_reports(graph, kernels.quantized, kernels.in_float)
    return Converted("onnxruntime", run, loaded, files, reports, layer_values=layer_values)


def _export(graph: fx.GraphModule) -> ir.Model:
    """Export a rewritten graph to ONNX."""
    make_exportable(graph)
    program = rewritten_program(graph)
    with quiet_torch(), torch.no_grad():
        table = dict(TRANSLATIONS)
        try:
            exported = torch.onnx.export(
                program, dynamo=True, opset_version=_OPSET, custom_translation_table=table
            )
        except torch.onnx.OnnxExporterError as error:
            raise TargetError(
                f"the ONNX exporter of torch cannot write this model: {_reason(error)}. The target "
                "'reference' takes every model"
            ) from error
    assert exported is not None
    return exported.model


def _reason(error: BaseException) -> str:
    """What an exporter's error comes from: the node, and why it cannot be translated."""
    messages: list[str] = []
    found: BaseException | None = error
    while found is not None:
        messages.append(str(found).partition(" See the stack trace")[0].rstrip("."))
        found = found.__cause__
    return ": ".join(messages[1:] or messages)


def _drop_notes(model: ir.Model) -> None:
    """Drop the exporter's notes on every node: a third of the file, with paths of the machine."""
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        node.metadata_props.clear()


def _drop_constant_shapes(proto: onnx.ModelProto, written: WrittenModel) -> None:
    """Drop the shapes of constants, which say nothing new; the runtime fuses by the others."""
    shapes = [entry for entry in proto.graph.value_info if not written.is_constant(entry.name)]
    del proto.graph.value_info[:]
    proto.graph.value_info.extend(shapes)


def _write(serialized: bytes, output: Path) -> Path:
    output.mkdir(parents=True, exist_ok=True)
    file, temporary = output / "model.onnx", output / "model.onnx.partial"
    temporary.write_bytes(serialized)
    temporary.replace(file)
    return file
