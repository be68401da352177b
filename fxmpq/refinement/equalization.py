"""Cross-layer equalization: what one layer's channels lack in range, the next layer gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx, nn

from fxmpq.calibration.recalibrate import recalibrate
from fxmpq.graph.attributes import get_tensor, set_tensor
from fxmpq.graph.batches import Batch, graph_device
from fxmpq.graph.state import Refinement, require
from fxmpq.refinement.best_seen import BestSeen
from fxmpq.refinement.outputs import model_outputs, output_error
from fxmpq.refinement.scalable_pairs import Pair, find_pairs
from fxmpq.refinement.units import Units, quantizer_tensors, set_quantizer_tensors

_SWEEPS = 100
_SETTLED = 1e-4
_DEAD = 1e-6


def equalization(
    graph: fx.GraphModule, batches: Sequence[Batch], *, units: Units
) -> list[Refinement]:
    """Equalize the ranges of weights across layers, and calibrate again.

    For two layers with only positively homogeneous operators between them, channel `i` of the
    first is divided by `s_i = sqrt(r1_i / r2_i)` and what the second has for it multiplied by it,
    where `r1_i` and `r2_i` are the largest magnitudes of the two weights in that channel: both
    become `sqrt(r1_i r2_i)`. This is repeated over all pairs until it settles (cross-layer
    equalization, Nagel et al. 2019, arXiv:1906.04721); chains through depthwise convolutions
    come out as the triples of that paper. The float model stays what it is but for rounding.

    Helps where channels share a scale: weights per tensor, and activations, which are so always.
    It has to come first in a recipe, since all ranges, scales and shifts are found again
    and stored codes are dropped. If the planned model's outputs are not closer to the float ones
    afterwards, everything is put back.

    Cost: two float and two quantized passes; none where the graph has no such pairs.

    Args:
        graph: Planned; changed in place, its float weights and biases replaced.
        batches: What the model takes.
        units: Keeps what was found.

    Returns:
        One entry for the whole model, none if no layers can be equalized.
    """
    pairs = find_pairs(graph)
    if not pairs:
        return []
    originals = {name: get_tensor(graph, name) for name in _names(pairs)}
    with torch.no_grad():
        equalized = equalize(originals, pairs)
    modules = _quantizers(graph)

    def compute() -> tuple[float, float, float]:
        expected = [model_outputs(graph, batch, quantized=False) for batch in batches]
        before = output_error(graph, batches, expected)
        kept = BestSeen(graph, modules, before)
        _set_tensors(graph, equalized)
        _copy_quantizers(recalibrate(graph, batches), graph, modules)
        after = output_error(graph, batches, expected)
        if after < before:
            return before, after, 1.0
        kept.restore()
        _set_tensors(graph, originals)
        return before, before, 0.0

    before, after, is_kept = units.unit("equalization", graph, modules, compute)
    if is_kept:
        _set_tensors(graph, equalized)
    return [Refinement("equalization", "", before, after)]


def equalize(tensors: Mapping[str, Tensor], pairs: Sequence[Pair]) -> dict[str, Tensor]:
    """Scale the channels of layer pairs against each other until their ranges are equal.

    A channel whose weights in either layer are below a millionth of that weight's largest stays:
    it is dead, and scaling it up would blow up its bias.

    Args:
        tensors: All weights and biases of the pairs by name; not changed.
        pairs: In graph order.

    Returns:
        The scaled tensors by name, computed in `float64` and rounded once.
    """
    found = {name: tensor.detach().double() for name, tensor in tensors.items()}
    for _ in range(_SWEEPS):
        largest = max(_equalize_pair(found, pair) for pair in pairs)
        if largest < _SETTLED:
            break
    return {name: _like(found[name].to(tensor.dtype), tensor) for name, tensor in tensors.items()}


def _equalize_pair(tensors: dict[str, Tensor], pair: Pair) -> float:
    """Equalize one pair in place on the mapping; returns the largest `|log s|`."""
    first, second = tensors[pair.first.weight], tensors[pair.second.weight]
    channels = first.shape[0]
    # [groups, output channels, input channels, values], the latter two within a group.
    groups = max(channels // second.shape[1], 1)
    columns = second.reshape(groups, second.shape[0] // groups, channels // groups, -1)
    ranges = first.abs().flatten(1).amax(dim=1), columns.abs().amax(dim=(1, 3)).flatten()
    alive = (ranges[0] > _DEAD * ranges[0].max()) & (ranges[1] > _DEAD * ranges[1].max())
    safe = [torch.where(alive, found, torch.ones_like(found)) for found in ranges]
    scales = (safe[0] / safe[1]).sqrt()
    tensors[pair.first.weight] = first / scales.reshape(-1, *[1] * (first.dim() - 1))
    spread = scales.reshape(groups, 1, -1, 1)
    tensors[pair.second.weight] = (columns * spread).reshape(second.shape)
    if pair.bias is not None:
        tensors[pair.bias] = tensors[pair.bias] / scales
    return float(scales.log().abs().max())


def _like(tensor: Tensor, original: Tensor) -> Tensor:
    if isinstance(original, nn.Parameter):
        return nn.Parameter(tensor, requires_grad=original.requires_grad)
    return tensor


def _names(pairs: Sequence[Pair]) -> list[str]:
    names: dict[str, None] = {}
    for pair in pairs:
        names.update(dict.fromkeys((pair.first.weight, pair.second.weight)))
        if pair.bias is not None:
            names[pair.bias] = None
    return list(names)


def _set_tensors(graph: fx.GraphModule, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        set_tensor(graph, name, tensor)


def _quantizers(graph: fx.GraphModule) -> list[str]:
    """Names of all quantizers and bias corrections."""
    names: dict[str, None] = {}
    for group in require(graph, stage="calibrated").groups:
        names.update(dict.fromkeys(group.activation_quantizers))
        for layer in group.layers:
            found = (layer.weight_quantizer, layer.bias_correction)
            names.update(dict.fromkeys(name for name in found if name is not None))
    return list(names)


def _copy_quantizers(
    source: fx.GraphModule, target: fx.GraphModule, modules: Sequence[str]
) -> None:
    for name in modules:
        found = quantizer_tensors(source.get_submodule(name))
        set_quantizer_tensors(target.get_submodule(name), found, graph_device(target))
