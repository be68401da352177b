"""What sample-based refinement trains: weights, scales, biases and ranges, each in its own unit."""

from __future__ import annotations

import math

import torch
from torch import Tensor, fx

from fxmpq.formats import NumberFormat
from fxmpq.graph.operators import output_channels
from fxmpq.graph.state import state_of
from fxmpq.quantizers.modules import ActivationQuantizer, WeightQuantizer
from fxmpq.quantizers.ranges import ActivationRange
from fxmpq.quantizers.scales import spread_scale
from fxmpq.quantizers.soft_rounding import (
    affine_round,
    hard_codes,
    rectified_sigmoid,
    rounding_penalty,
    rounding_start,
    straight_through_round,
)
from fxmpq.refinement.views import QuantizedLayer

# How near to the middle between two codes a weight may start.
_INSIDE = 0.49
# Scales stay within a thousandth and a thousand times what they were.
_LARGEST_CHANGE = math.log(1e3)


class FreeWeight:
    """A weight that may move any number of grid steps, with its scales.

    `W' = s * round(clip(u * s_0 / s))`, with `u` the weight in steps of its first scale `s_0`,
    and roundings straight through. It begins at the weight, or as near to it as rounds to the
    present codes.

    Args:
        quantizer: Of the weight.
        weight: The float weight.
    """

    def __init__(self, quantizer: WeightQuantizer, weight: Tensor) -> None:
        assert quantizer.active is not None
        self._quantizer = quantizer
        self._format: NumberFormat = quantizer.active
        self._scale = quantizer.scale(self._format).detach().clone()
        self._spread = quantizer.spread_scale(weight, self._format).detach().clone()
        codes = quantizer.codes(weight, self._format).to(weight.dtype)
        start = torch.maximum(weight / self._spread, codes - _INSIDE)
        self.steps = torch.minimum(start, codes + _INSIDE).requires_grad_()
        self.scale_change = torch.zeros_like(self._scale, requires_grad=True)

    def value(self) -> Tensor:
        """The quantized weight, with gradients to `steps` and `scale_change`."""
        codes, spread = self._codes()
        return straight_through_round(codes) * spread

    def write(self) -> None:
        """Store codes and scales in the quantizer."""
        with torch.no_grad():
            codes, _ = self._codes()
            self._quantizer.set_codes(self._format, codes.round())
            self._quantizer.set_scale(self._format, self._new_scale().detach())

    def _new_scale(self) -> Tensor:
        return self._scale * _factor(self.scale_change)

    def _codes(self) -> tuple[Tensor, Tensor]:
        axis, granularity = self._quantizer.axis, self._format.granularity
        spread = spread_scale(self._new_scale(), self.steps.shape, axis, granularity)
        moved = self.steps * (self._spread / spread)
        return moved.clamp(self._format.qmin, self._format.qmax), spread


class SoftWeight:
    """A weight between two codes (AdaRound): `W' = s * (lower + h(v))`.

    Args:
        quantizer: Of the weight.
        weight: The float weight.
    """

    def __init__(self, quantizer: WeightQuantizer, weight: Tensor) -> None:
        assert quantizer.active is not None
        self._quantizer = quantizer
        self._format: NumberFormat = quantizer.active
        self._spread = quantizer.spread_scale(weight, self._format).detach()
        codes = quantizer.codes(weight, self._format)
        self._lower, v = rounding_start(weight, self._spread, codes, self._format)
        self.v = v.requires_grad_()

    def value(self) -> Tensor:
        """The softly rounded weight, with gradients to `v`."""
        return (self._lower + rectified_sigmoid(self.v)) * self._spread

    def penalty(self, beta: float) -> Tensor:
        """Distance from a hard rounding; see `rounding_penalty`."""
        return rounding_penalty(rectified_sigmoid(self.v), beta)

    def write(self) -> None:
        """Store the hard codes in the quantizer."""
        self._quantizer.set_codes(self._format, hard_codes(self._lower, self.v.detach()))


def shares_range(graph: fx.GraphModule, name: str | None) -> bool:
    """Whether an activation quantizer, by its module name, has one range with others."""
    return any(name in names for names in state_of(graph).shared_ranges)


class LearnedRange:
    """An activation's range: its scale, and its zero point unless that is an end of the codes.

    A zero point at an end is left there: a tensor that is never negative (or never positive)
    has nothing beyond zero. So is that of a symmetric range, in the middle.

    Args:
        quantizer: Of the activation, with an active format.
    """

    def __init__(self, quantizer: ActivationQuantizer) -> None:
        assert quantizer.active is not None
        self._quantizer = quantizer
        self._format: NumberFormat = quantizer.active
        self._start = quantizer.ranges[self._format.name]
        is_at_end = self._start.zero_point in (self._format.qmin, self._format.qmax)
        self._has_centre = not (is_at_end or quantizer.is_symmetric)
        self.scale_change = torch.zeros((), requires_grad=True)
        self.centre_change = torch.zeros((), requires_grad=True)

    def __call__(self, x: Tensor) -> Tensor:
        """Quantize, with gradients to `x`, `scale_change` and `centre_change`."""
        scale, centre = (found.to(x.device, x.dtype) for found in self._grid())
        return affine_round(x, scale, centre, self._format.qmin, self._format.qmax)

    def write(self) -> None:
        """Store the range in the quantizer."""
        scale, centre = (found.detach() for found in self._grid())
        found = ActivationRange(float(scale), round(float(centre)))
        self._quantizer.ranges[self._format.name] = found

    def _grid(self) -> tuple[Tensor, Tensor]:
        low, high = self._format.qmin, self._format.qmax
        centre = self._start.zero_point + self.centre_change * (high - low) * self._has_centre
        return self._start.scale * _factor(self.scale_change), centre.clamp(low, high)


class LearnedBias:
    """A layer's bias: `b + unit * change`.

    Args:
        layer: Has a bias correction.
        unit: What a change of 1 stands for.
    """

    def __init__(self, layer: QuantizedLayer, unit: float) -> None:
        self._layer, self._unit = layer, unit
        found = layer.quantized_bias
        channels = output_channels(layer.node, layer.weight.shape)
        self._start = layer.weight.new_zeros(channels) if found is None else found.detach()
        self.change = torch.zeros_like(self._start, requires_grad=True)

    def value(self) -> Tensor:
        """The bias, with gradients to `change`."""
        return self._start + self._unit * self.change

    def write(self) -> None:
        """Store the bias as a shift."""
        self._layer.set_bias(self.value().detach())


def _factor(change: Tensor) -> Tensor:
    return change.clamp(-_LARGEST_CHANGE, _LARGEST_CHANGE).exp()
