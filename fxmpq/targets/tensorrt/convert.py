"""Convert to an ONNX file by TensorRT's rules, and compute with it in ONNX Runtime."""

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
from fxmpq.graph.state import Layer, state_of
from fxmpq.targets.onnx_compact import compact
from fxmpq.targets.onnx_export import check_size, export_onnx, write_onnx
from fxmpq.targets.onnx_parts import onnx_parts
from fxmpq.targets.onnxruntime.layer_nodes import WrittenModel, layer_nodes, visible_value
from fxmpq.targets.onnxruntime.session import OnnxModel
from fxmpq.targets.outcome import layer_reports
from fxmpq.targets.target import Converted, LayerValue
from fxmpq.targets.tensorrt.described import DescribedLayers
from fxmpq.targets.tensorrt.layout import dequantize_at_each_reader, store_four_bits
from fxmpq.targets.tensorrt.rewrite import to_symmetric_qdq
from fxmpq.targets.tensorrt.rules import lint_model
from fxmpq.targets.tensorrt.translate import TRANSLATIONS

_OPSET = 21
"""The first with weights of 4 bits in blocks."""

_SHOWN = 5


def convert_tensorrt(graph: fx.GraphModule, output: Path | None) -> Converted:
    """Write an ONNX file that keeps to TensorRT's rules, and check it against them.

    TensorRT itself is not run: `run` computes the file operator by operator in ONNX Runtime, which
    tells that it says what the simulation says, not how TensorRT would run it.

    Args:
        graph: With chosen precisions; not changed.
        output: Folder to write `model.onnx` to, made if missing.

    Returns:
        The converted model; its `module` is an `OnnxModel`.

    Raises:
        TargetError: If the file breaks a rule, naming node and rule; if one file cannot hold the
            model; or if torch's ONNX exporter has no translation for a node.
    """
    model = export_onnx(to_symmetric_qdq(graph), TRANSLATIONS, _OPSET)
    store_four_bits(model)
    dequantize_at_each_reader(model)
    proto = ir.to_proto(model)
    check_size(proto)
    # Checked with the exporter's names, which tell more in a message.
    _check(proto)
    compact(proto, layer_nodes(WrittenModel(proto), graph))
    serialized = proto.SerializeToString()
    threads = torch.get_num_threads()
    # Fused operators would be ONNX Runtime's own, and some of those are wrong on E4M3.
    loaded = OnnxModel(serialized, threads, optimized=False)
    files = () if output is None else (write_onnx(serialized, output),)
    written = WrittenModel(proto)

    def run(batch: Batch) -> Sequence[Tensor]:
        return loaded(flat_inputs(graph, batch))

    @cache
    def shown() -> tuple[OnnxModel, dict[str, tuple[str, str]]]:
        return _showing_layers(graph, proto, written, threads)

    def layer_values(batch: Batch) -> Sequence[LayerValue]:
        runtime, places = shown()
        names = [entry.name for entry in runtime.session.get_outputs()]
        values = dict(zip(names, runtime(flat_inputs(graph, batch)), strict=True))
        return [LayerValue(layer, node, values[value]) for layer, (node, value) in places.items()]

    described = DescribedLayers(graph, written)
    reports = layer_reports(graph, described)
    return Converted(
        "tensorrt",
        run,
        loaded,
        files,
        reports,
        layer_values=layer_values,
        parts=onnx_parts(proto, graph),
    )


def _check(proto: onnx.ModelProto) -> None:
    """Refuse a file that breaks a rule."""
    violations = lint_model(proto)
    if not violations:
        return
    found = [
        f"{entry.node or 'the model'} breaks {entry.rule!r} ({entry.message})"
        for entry in violations[:_SHOWN]
    ]
    more = f"; and {len(violations) - _SHOWN} more" if len(violations) > _SHOWN else ""
    raise TargetError(
        f"the model cannot be written by TensorRT's rules: {'; '.join(found)}{more}. Keep these "
        "layers in float, prepare(..., exclude=[...]), or take the target 'onnxruntime'"
    )


def _showing_layers(
    graph: fx.GraphModule, proto: onnx.ModelProto, written: WrittenModel, threads: int
) -> tuple[OnnxModel, dict[str, tuple[str, str]]]:
    """The model with layers' results as further outputs, and the node and value of each layer."""
    layers: dict[str, Layer] = {
        layer.name: layer for group in state_of(graph).groups for layer in group.layers
    }
    nodes = {node.name: node for node in graph.graph.nodes}
    places = {
        name: visible_value(written, node, graph, nodes[layers[name].node], layers[name])
        for name, node in layer_nodes(written, graph).items()
    }
    model = onnx.ModelProto()
    model.CopyFrom(proto)
    names = dict.fromkeys(value for _, value in places.values())
    for returned in proto.graph.output:
        names.pop(returned.name, None)
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    return OnnxModel(model.SerializeToString(), threads, optimized=False), places
