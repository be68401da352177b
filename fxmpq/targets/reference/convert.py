"""Convert to the reference form, which defines the numbers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, fx, nn

from fxmpq.formats import NumberFormat, Precision
from fxmpq.granularity import PerBlock
from fxmpq.graph.attributes import get_tensor
from fxmpq.graph.batches import Batch
from fxmpq.graph.run import run_batch
from fxmpq.graph.state import Member, state_of
from fxmpq.quantizers.codes import dequantize
from fxmpq.quantizers.modules import ActivationQuantizer, WeightQuantizer
from fxmpq.quantizers.packing import pack_codes, unpack_codes
from fxmpq.quantizers.scales import pack_scale, spread_scale, unpack_scale
from fxmpq.targets.layer_outputs import LayerOutputs
from fxmpq.targets.lowering import finish, lower, quantizer_of
from fxmpq.targets.outcome import layer_names, layer_reports
from fxmpq.targets.target import Converted, LayerValue

SCHEMA = "fxmpq.reference"
VERSION = 2


class PackedWeight(nn.Module):
    """A weight stored as packed codes and its scales, as `pack_scale` stores them.

    Args:
        codes: Codes in the weight's shape.
        scale: In the shape that `scale_shape` gives.
        number_format: Of the codes and scales.
        axis: The channel dimension.
    """

    packed: Tensor

    def __init__(
        self, codes: Tensor, scale: Tensor, number_format: NumberFormat, axis: int
    ) -> None:
        super().__init__()
        self.register_buffer("packed", pack_codes(codes, number_format.bits))
        stored = pack_scale(scale, number_format)
        for name, tensor in stored.items():
            self.register_buffer(name, tensor)
        self.scale_names = tuple(stored)
        self.number_format = number_format
        self.shape = tuple(codes.shape)
        self.stride = codes.stride()
        self.axis = axis

    def forward(self) -> Tensor:
        """Unpack and dequantize: the weight in real numbers."""
        found = self.number_format
        codes = unpack_codes(self.packed, found.bits, self.shape, signed=found.is_integer)
        if codes.stride() != self.stride:
            # In the simulation's memory layout, and so with its kernel and its bits.
            codes = torch.empty_strided(
                self.shape, self.stride, dtype=codes.dtype, device=codes.device
            ).copy_(codes)
        stored = {name: self.get_buffer(name) for name in self.scale_names}
        scale = unpack_scale(stored, found)
        spread = spread_scale(scale, self.shape, self.axis, found.granularity)
        return dequantize(codes, spread, found)


def convert_reference(graph: fx.GraphModule, output: Path | None) -> Converted:
    """Replace quantized weights by packed codes and bake bias corrections in.

    The result computes exactly what the simulation computes. With `output`, a folder, it
    writes `model.safetensors` (codes as `uint8` bytes, scales, and all float tensors) and
    `model.json` (per weight: format, bits, shape, channel axis, block size, how scales are
    stored; per activation: format, bits, scale and zero point, `null` where its range is dynamic).

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

    def layer_values(batch: Batch) -> Sequence[LayerValue]:
        return LayerOutputs(converted, layers).collect(batch)

    layers = layer_names(graph)
    reports = layer_reports(graph, _kernel)
    return Converted("reference", run, converted, files, reports, layer_values=layer_values)


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
    granularity = active.granularity
    return {
        "codes": f"{name}.packed",
        **{key: f"{name}.{key}" for key in packed.scale_names},
        "format": active.name,
        "numbers": active.scheme.value,
        "bits": active.bits,
        "shape": list(codes.shape),
        "channel_axis": quantizer.axis,
        "scale_format": active.scale_kind.value,
        "block": granularity.size if isinstance(granularity, PerBlock) else None,
    }


def _write(
    graph: fx.GraphModule, weights: dict[str, dict[str, object]], output: Path
) -> tuple[Path, ...]:
    output.mkdir(parents=True, exist_ok=True)
    state = state_of(graph)
    activations = {
        module.name: {
            "format": module.active.name,
            "numbers": module.active.scheme.value,
            "bits": module.active.bits,
            **_grid(module, module.active),
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


def _grid(quantizer: ActivationQuantizer, active: NumberFormat) -> dict[str, object]:
    """The scale and zero point of an activation; `None` where each run finds its own."""
    if active.dynamic is not None:
        return {"scale": None, "zero_point": None}
    found = quantizer.ranges[active.name]
    return {"scale": found.scale, "zero_point": found.zero_point}


def _kernel(member: Member, precision: Precision) -> tuple[str, str]:
    seen = "float" if precision.activation is None else precision.activation.name
    if precision.weight is None:
        return f"float on {seen} operands", ""
    return f"float on dequantized {precision.weight.name} weights, {seen} input", ""
