"""Convert to the reference form, which defines the numbers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, fx, nn

from fxmpq.formats import NumberFormat, Precision
from fxmpq.graph.attributes import get_tensor
from fxmpq.graph.batches import Batch
from fxmpq.graph.run import run_batch
from fxmpq.graph.state import Layer, state_of
from fxmpq.quantizers.integer import dequantize_weight
from fxmpq.quantizers.modules import ActivationQuantizer, WeightQuantizer
from fxmpq.quantizers.packing import pack_codes, unpack_codes
from fxmpq.targets.lowering import finish, lower, quantizer_of
from fxmpq.targets.outcome import layer_reports
from fxmpq.targets.target import Converted

SCHEMA = "fxmpq.reference"
VERSION = 1


class PackedWeight(nn.Module):
    """A weight stored as packed integer codes and one scale per channel.

    Args:
        codes: Integer codes in the weight's shape.
        scale: Shape `[channels]`.
        number_format: Of the codes.
        axis: The channel dimension.
    """

    packed: Tensor
    scale: Tensor

    def __init__(
        self, codes: Tensor, scale: Tensor, number_format: NumberFormat, axis: int
    ) -> None:
        super().__init__()
        self.register_buffer("packed", pack_codes(codes, number_format.bits))
        self.register_buffer("scale", scale)
        self.number_format = number_format
        self.shape = tuple(codes.shape)
        self.axis = axis

    def forward(self) -> Tensor:
        """Unpack and dequantize: the weight in real numbers."""
        codes = unpack_codes(self.packed, self.number_format.bits, self.shape)
        return dequantize_weight(codes, self.scale, self.axis)


def convert_reference(graph: fx.GraphModule, output: Path | None) -> Converted:
    """Replace quantized weights by packed codes and bake bias corrections in.

    The result computes exactly what the simulation computes. With `output`, a folder, it
    writes `model.safetensors` (codes as `uint8` bytes, scales, and all float tensors) and
    `model.json` (per weight: bits, shape, channel axis; per activation: bits, scale, zero
    point).

    Args:
        graph: With chosen precisions; not changed.
        output: Folder to write, made if missing.

    Returns:
        The converted model; its `module` is a graph module called like the original.
    """
    converted = lower(graph)
    weights: dict[str, dict[str, object]] = {}
    for node in list(converted.graph.nodes):
        module = quantizer_of(converted, node)
        if isinstance(module, WeightQuantizer) and module.active is not None:
            weights[module.name] = _pack(converted, node, module, module.active)
    finish(converted)
    files = () if output is None else _write(converted, weights, output)

    def run(batch: Batch) -> Sequence[Tensor]:
        return [leaf for leaf in run_batch(converted, batch) if isinstance(leaf, Tensor)]

    return Converted("reference", run, converted, files, layer_reports(graph, _kernel))


def _pack(
    graph: fx.GraphModule, node: fx.Node, quantizer: WeightQuantizer, active: NumberFormat
) -> dict[str, object]:
    """Put a packed weight in a quantizer's place; returns its entry of the manifest."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    with torch.no_grad():
        codes = quantizer.codes(get_tensor(graph, str(source.target)), active)
    name = f"packed.{source.name}"
    packed = PackedWeight(codes, quantizer.scale(active), active, quantizer.axis)
    graph.add_submodule(name, packed)
    with graph.graph.inserting_before(node):
        node.replace_all_uses_with(graph.graph.call_module(name, ()))
    graph.graph.erase_node(node)
    return {
        "codes": f"{name}.packed",
        "scale": f"{name}.scale",
        "bits": active.bits,
        "shape": list(codes.shape),
        "channel_axis": quantizer.axis,
    }


def _write(
    graph: fx.GraphModule, weights: dict[str, dict[str, object]], output: Path
) -> tuple[Path, ...]:
    output.mkdir(parents=True, exist_ok=True)
    state = state_of(graph)
    activations = {
        module.name: {
            "bits": module.active.bits,
            "scale": module.ranges[module.active.name].scale,
            "zero_point": module.ranges[module.active.name].zero_point,
        }
        for module in graph.modules()
        if isinstance(module, ActivationQuantizer) and module.active is not None
    }
    manifest = {
        "schema": SCHEMA,
        "version": VERSION,
        "fingerprint": state.fingerprint,
        "choices": state.choices,
        "weights": weights,
        "activations": activations,
    }
    tensors = {name: tensor.detach().contiguous() for name, tensor in graph.state_dict().items()}
    tensor_file, manifest_file = output / "model.safetensors", output / "model.json"
    temporary = output / "model.safetensors.partial"
    save_file(tensors, temporary)
    temporary.replace(tensor_file)
    manifest_file.write_text(json.dumps(manifest, indent=1, allow_nan=False))
    return (tensor_file, manifest_file)


def _kernel(layer: Layer, precision: Precision) -> tuple[str, str]:
    seen = "float" if precision.activation is None else precision.activation.name
    assert precision.weight is not None
    return f"float on dequantized {precision.weight.name} weights, {seen} input", ""
