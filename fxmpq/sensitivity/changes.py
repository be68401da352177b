"""What a layer's weight and bias become at each weight format, as changes against float."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from fxmpq.formats import NumberFormat
from fxmpq.graph.attributes import get_tensor
from fxmpq.graph.state import Layer
from fxmpq.quantizers.integer import per_channel
from fxmpq.quantizers.modules import BiasCorrection, WeightQuantizer


@dataclass(frozen=True)
class WeightChanges:
    """Changes of one layer.

    Args:
        bits: Widths of the weight formats.
        weights: Rounded minus float weight, `[formats, *weight]`.
        shifts: Bias corrections, `[formats, channels]`; `None` if the layer has none.
    """

    bits: tuple[int, ...]
    weights: Tensor
    shifts: Tensor | None


def weight_changes(
    graph: fx.GraphModule, layer: Layer, rows: Tensor | None = None
) -> WeightChanges:
    """Form a layer's changes for every calibrated weight format.

    Args:
        graph: A calibrated graph.
        layer: One with a weight quantizer.
        rows: Numbers of the weight's rows to round, as those of a table that a batch reads;
            all by default.

    Returns:
        `Q_b(W) - W` per format, of these rows, and the bias shifts that go with them.
    """
    assert layer.weight_quantizer is not None
    quantizer = graph.get_submodule(layer.weight_quantizer)
    assert isinstance(quantizer, WeightQuantizer)
    weight = get_tensor(graph, layer.weight).detach()
    scales = [quantizer.scale(number_format) for number_format in quantizer.formats]
    if rows is not None:
        weight = weight[rows]
        scales = [scale[rows] if quantizer.axis == 0 else scale for scale in scales]
    dtype = torch.result_type(weight, scales[0])
    changes = torch.empty(len(scales), *weight.shape, dtype=dtype, device=weight.device)
    for change, scale, number_format in zip(changes, scales, quantizer.formats, strict=True):
        _write_change(
            change, weight, per_channel(scale, weight.dim(), quantizer.axis), number_format
        )
    bits = tuple(number_format.bits for number_format in quantizer.formats)
    return WeightChanges(bits, changes, _shifts(graph, layer, quantizer))


def _write_change(change: Tensor, weight: Tensor, scale: Tensor, to: NumberFormat) -> None:
    """`change = Q(weight) - weight`, equal to `WeightQuantizer.quantize` to the last bit.

    Written in place: allocating every intermediate would take four times as long.
    """
    torch.div(weight, scale, out=change).round_().clamp_(to.qmin, to.qmax)
    change.mul_(scale).sub_(weight)


def _shifts(graph: fx.GraphModule, layer: Layer, quantizer: WeightQuantizer) -> Tensor | None:
    if layer.bias_correction is None:
        return None
    correction = graph.get_submodule(layer.bias_correction)
    assert isinstance(correction, BiasCorrection)
    found = [correction.shift(number_format) for number_format in quantizer.formats]
    kept = [shift for shift in found if shift is not None]
    return torch.stack(kept) if kept and len(kept) == len(found) else None
