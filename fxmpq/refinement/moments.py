"""Second moments of what a layer reads: all that its reconstruction error needs to know."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from fxmpq.quantizers.second_order import Quadratic
from fxmpq.refinement.patches import Rows, Window, conv_rows, linear_rows
from fxmpq.refinement.views import LayerView

_PARTS = 4
_WIDE = 256


@dataclass(frozen=True)
class Moments:
    """Second moments of a layer's quantized input and of what input quantization takes away.

    With `u` the quantized patch that a group of a convolution multiplies (for a linear layer the
    input itself), `y = W x + b` the float output and `d = y - (W u + b)`, a weight `W + D` and a
    bias `b + s` miss the float output by `d - D u - s`, whose mean square per output channel is

        E[d^2] - 2 D E[u d] + D E[u u^T] D^T - 2 s (E[d] - D E[u]) + s^2

    So once the moments are known, nothing depends on the number of samples any more; and since
    `d` is what is summed and not `y`, small errors are not differences of large numbers. All is
    `float64`, in dimensions `[groups, channels per group, weights per channel]`.

    Args:
        second: `E[u u^T]`, shape `[groups, weights, weights]`.
        mean: `E[u]`, shape `[groups, weights]`.
        cross: `E[d u^T]`, shape `[groups, channels, weights]`.
        residual: `E[d]`, shape `[groups, channels]`.
        residual_power: `E[d^2]`, shape `[groups, channels]`.
        signal: `E[y^2]` summed over channels.
    """

    second: Tensor
    mean: Tensor
    cross: Tensor
    residual: Tensor
    residual_power: Tensor
    signal: float

    def rows(self, values: Tensor) -> Tensor:
        """Bring a weight, or what has its shape, into the dimensions used here, in `float64`."""
        groups, channels = self.residual.shape
        return values.double().reshape(groups, channels, -1)

    def quadratic(self, *, free_bias: bool) -> Quadratic:
        """The mean square error as a function of `D`, but for a constant.

        Args:
            free_bias: Whether the bias follows `D` (see `shift`), so that only what varies
                counts and the moments are centred. Else the bias stays the float model's.
        """
        if not free_bias:
            return Quadratic(self.second, self.cross)
        second = self.second - self.mean.unsqueeze(2) * self.mean.unsqueeze(1)
        cross = self.cross - self.residual.unsqueeze(2) * self.mean.unsqueeze(1)
        return Quadratic(second, cross)

    def shift(self, change: Tensor) -> Tensor:
        """The best addition to the float bias, `E[d] - D E[u]`: bias correction on real inputs.

        Args:
            change: `D`, shape `[groups, channels, weights]`.

        Returns:
            Shape `[groups, channels]`.
        """
        return self.residual - (change @ self.mean.unsqueeze(2)).squeeze(2)

    def error(self, change: Tensor, shift: Tensor) -> float:
        """Relative squared error of the output; `LayerView.error` spends passes to find it.

        Args:
            change: `D`, shape `[groups, channels, weights]`.
            shift: `s`, shape `[groups, channels]`.

        Returns:
            `E[(d - D u - s)^2] / E[y^2]`, both summed over channels; infinity where `y` is all
            zeros and the error is not.
        """
        varying = Quadratic(self.second, self.cross).values(change) + self.residual_power
        noise = float((varying + shift * (shift - 2 * self.shift(change))).sum())
        if noise <= 0:
            return 0.0
        return noise / self.signal if self.signal > 0 else math.inf


def layer_moments(view: LayerView) -> Moments:
    """Gather a layer's moments in one pass over its inputs.

    A few samples at a time are multiplied in `float32`, and the products added up in `float64`.
    Patches of a convolution with stride 1 overlap so much that products of rows a few rows apart
    give all of `E[u u^T]`: for a 3 x 3 kernel with a third of the multiplications and of the
    memory that unfolded patches take.

    Args:
        view: A convolution or linear layer.

    Returns:
        Its moments over all batches and positions.
    """
    sums: _Sums | None = None
    window = None if view.operator.kind == "linear" else Window.of(view.node, view.weight)
    power = 0.0
    for batch in range(len(view)):
        u = view.input(batch)
        if view.correction is None:
            d, y = _with_computed_bias(view, batch)
            power += float(y.double().square().sum())
        else:
            d = view.output(view.float_input(batch) - u, view.weight, None)
        for rows in linear_rows(u, d) if window is None else conv_rows(window, u, d):
            sums = sums or _Sums(rows)
            sums.add(rows)
    assert sums is not None
    found = sums.moments()
    if view.correction is None:
        return replace(found, signal=power / sums.count)
    return replace(found, signal=_signal(found, view.weight, view.float_bias))


def _with_computed_bias(view: LayerView, batch: int) -> tuple[Tensor, Tensor]:
    """`d` and `y` of a layer whose bias comes from the sample, and has errors of its own."""
    y = view.float_output(batch)
    of_rounding = view.output(view.input(batch), view.quantized_weight - view.weight, None)
    return y - view.quantized_output(batch) + of_rounding, y


class _Sums:
    """Sums of products of rows.

    A patch takes rows `a = 0, 1, ...` below its first one. `second[a][b]`, for `b >= a`, sums
    products of rows `b - a` apart over those that can be the `a`-th and `b`-th of a patch.

    Args:
        rows: A first piece, for its sizes.
    """

    def __init__(self, rows: Rows) -> None:
        groups, values = rows.values.shape[:2]
        channels, taps = rows.residual.shape[1], rows.taps

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=rows.values.device)

        self._places = rows.places
        self._second = zeros(taps, taps, groups, values, values)
        self._mean = zeros(taps, groups, values)
        self._cross = zeros(taps, groups, channels, values)
        self._residual = zeros(groups, channels)
        self._power = zeros(groups, channels)
        self.count = 0

    def add(self, rows: Rows) -> None:
        """Add a piece of the data."""
        totals = rows.values.sum(3)
        for tap in range(rows.taps):
            window = slice(tap, tap + rows.outputs)
            self._mean[tap] += totals[:, :, window].sum(2)
            self._cross[tap] += rows.residual @ rows.between(window.start, window.stop).mT
        for apart in range(rows.taps):
            self._add_second(rows, apart)
        self._residual += rows.residual.sum(2)
        self._power += rows.residual.square().sum(2)
        self.count += rows.residual.shape[2]

    def _add_second(self, rows: Rows, apart: int) -> None:
        """Add products of rows this far apart, each stretch multiplied once for all taps."""
        last = rows.taps - apart
        starts = {*range(last), *range(rows.outputs, rows.outputs + last)}
        stretches = {
            start: _product(
                rows.between(start, stop), rows.between(start + apart, stop + apart), apart == 0
            )
            for start, stop in pairwise(sorted(starts))
        }
        for tap in range(last):
            window = range(tap, tap + rows.outputs)
            self._second[tap, tap + apart] += sum(
                product for start, product in stretches.items() if start in window
            )

    def moments(self) -> Moments:
        """What the sums come to, but for the signal."""
        taps, _, groups, values, _ = self._second.shape
        for first in range(taps):
            upper = self._second[first, first].triu()
            self._second[first, first] = upper + upper.triu(1).mT
            for later in range(first + 1, taps):
                self._second[later, first] = self._second[first, later].mT
        split = (values // self._places, self._places)
        second = self._second.reshape(taps, taps, groups, *split, *split)
        second = second.permute(2, 3, 0, 4, 5, 1, 6).reshape(groups, taps * values, -1)
        mean = self._mean.reshape(taps, groups, *split).permute(1, 2, 0, 3)
        cross = self._cross.reshape(taps, groups, -1, *split).permute(1, 2, 3, 0, 4)
        return Moments(
            second / self.count,
            mean.reshape(groups, -1) / self.count,
            cross.reshape(groups, -1, taps * values) / self.count,
            self._residual / self.count,
            self._power / self.count,
            0.0,
        )


def _product(left: Tensor, right: Tensor, symmetric: bool) -> Tensor:
    """`left right^T`; of a symmetric product only what is on or above the diagonal counts."""
    size = left.shape[1]
    if not symmetric or size < _WIDE:
        return left @ right.mT
    product = left.new_zeros(left.shape[0], size, size)
    edges = [size * part // _PARTS for part in range(_PARTS + 1)]
    for start, stop in pairwise(edges):
        product[:, start:stop, start:] = left[:, start:stop] @ right[:, start:].mT
    return product


def _signal(moments: Moments, weight: Tensor, bias: Tensor | None) -> float:
    """`E[y^2]` of `y = d + W u + b`."""
    rows = moments.rows(weight)
    offset = torch.zeros_like(moments.residual) if bias is None else bias.double()
    offset = offset.reshape(moments.residual.shape)
    # With no weight at all, the shift that D = W wants is minus the mean of the output
    mean = 2 * moments.residual - moments.shift(rows)
    power = Quadratic(moments.second, -moments.cross).values(rows) + moments.residual_power
    return float((power + offset * (2 * mean + offset)).sum())
