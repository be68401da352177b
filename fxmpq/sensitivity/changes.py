"""What a layer's weight and bias become at each weight format, as changes against float."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from fxmpq.formats import NumberFormat
from fxmpq.granularity import PerTensor
from fxmpq.graph.attributes import get_tensor
from fxmpq.graph.state import Layer
from fxmpq.quantizers.codes import dequantize, round_in_place
from fxmpq.quantizers.modules import BiasCorrection, WeightQuantizer
from fxmpq.quantizers.scales import spread_scale


@dataclass(frozen=True)
class WeightChanges:
    """Changes of one layer.

    Args:
        formats: The weight formats.
        weights: Rounded minus float weight, `[formats, *weight]`.
        shifts: Bias corrections, `[formats, channels]`; `None` if the layer has none.
    """

    formats: tuple[NumberFormat, ...]
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
    if rows is not None:
        weight = weight[rows]
    scales = [_spread(quantizer, weight, entry, rows) for entry in quantizer.formats]
    dtype = torch.result_type(weight, scales[0])
    changes = torch.empty(len(scales), *weight.shape, dtype=dtype, device=weight.device)
    for change, scale, number_format in zip(changes, scales, quantizer.formats, strict=True):
        stored = quantizer.stored_codes(number_format)
        if stored is None:
            _write_change(change, weight, scale, number_format)
        else:
            codes = stored if rows is None else stored[rows]
            torch.sub(dequantize(codes, scale, number_format), weight, out=change)
    return WeightChanges(quantizer.formats, changes, _shifts(graph, layer, quantizer))


def _spread(
    quantizer: WeightQuantizer, weight: Tensor, number_format: NumberFormat, rows: Tensor | None
) -> Tensor:
    """Scales that broadcast against a weight, or against some rows of it."""
    scale, granularity = quantizer.scale(number_format), number_format.granularity
    if rows is not None and quantizer.axis == 0 and not isinstance(granularity, PerTensor):
        scale = scale[rows]
    return spread_scale(scale, weight.shape, quantizer.axis, granularity)


def _write_change(change: Tensor, weight: Tensor, scale: Tensor, to: NumberFormat) -> None:
    """`change = Q(weight) - weight`, equal to `WeightQuantizer.quantize` to the last bit.

    Written in place: allocating every intermediate would take four times as long.
    """
    torch.div(weight, scale, out=change)
    round_in_place(change, to).mul_(scale).sub_(weight)


def _shifts(graph: fx.GraphModule, layer: Layer, quantizer: WeightQuantizer) -> Tensor | None:
    if layer.bias_correction is None:
        return None
    correction = graph.get_submodule(layer.bias_correction)
    assert isinstance(correction, BiasCorrection)
    found = [correction.shift(number_format) for number_format in quantizer.formats]
    kept = [shift for shift in found if shift is not None]
    return torch.stack(kept) if kept and len(kept) == len(found) else None
