"""Activation ranges: the scale and zero point that lose least, found on a histogram."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fxmpq.formats import NumberFormat
from fxmpq.quantizers.histogram import StreamingHistogram

_COARSE = torch.exp2(-torch.arange(0, 41, dtype=torch.float64) / 8)
_FINE = torch.linspace(0.9, 1.1, 21, dtype=torch.float64)


@dataclass(frozen=True)
class ActivationRange:
    """An affine grid for one tensor: `x = scale * (code - zero_point)`.

    Args:
        scale: Positive step, rounded to `float32`, in which runtimes hold it.
        zero_point: The code of 0.0.
    """

    scale: float
    zero_point: int


def mse_activation_range(
    histogram: StreamingHistogram, number_format: NumberFormat
) -> ActivationRange:
    """Find the clipping range that minimises the squared quantization error.

    Minimises `sum_i n_i (x_i - Q(x_i))^2` over ranges `[r_l * min, r_h * max]`: first both
    ends shrink together (41 ratios from 1 to 1/32), then each end is refined alone. Zero is
    always exactly representable, and a tensor that is never negative gets zero point 0, so
    that runtimes absorb a preceding ReLU.

    Args:
        histogram: At least one batch of values.
        number_format: An affine format.

    Returns:
        The best range found; a tensor of zeros gets scale 1.

    Examples:
        >>> from fxmpq.formats import Scheme
        >>> histogram = StreamingHistogram()
        >>> histogram.update(torch.linspace(0, 1, 1001))
        >>> mse_activation_range(histogram, NumberFormat(8, Scheme.AFFINE)).zero_point
        0
    """
    low, high = min(0.0, histogram.minimum), max(0.0, histogram.maximum)
    if low == high:
        return ActivationRange(1.0, 0)
    kept = histogram.counts > 0
    values, counts = histogram.centres[kept], histogram.counts[kept]

    def best(low_ratios: Tensor, high_ratios: Tensor) -> tuple[float, float]:
        lows, highs = low * low_ratios, high * high_ratios
        errors = _range_errors(values, counts, lows, highs, number_format)
        index = int(errors.argmin())
        return float(low_ratios[index]), float(high_ratios[index])

    low_ratio, high_ratio = best(_COARSE, _COARSE)
    for _ in range(2):
        trials = torch.cat([_FINE * high_ratio, _COARSE]).clamp(max=1.0)
        _, high_ratio = best(torch.full_like(trials, low_ratio), trials)
        trials = torch.cat([_FINE * low_ratio, _COARSE]).clamp(max=1.0)
        low_ratio, _ = best(trials, torch.full_like(trials, high_ratio))
    scale, zero_point = _grid(
        torch.tensor([low * low_ratio], dtype=torch.float64),
        torch.tensor([high * high_ratio], dtype=torch.float64),
        number_format,
    )
    return ActivationRange(float(scale), int(zero_point))


def _grid(lows: Tensor, highs: Tensor, number_format: NumberFormat) -> tuple[Tensor, Tensor]:
    """Return scales (rounded to `float32`, held in `float64`) and zero points of ranges."""
    scale = ((highs - lows) / (number_format.qmax - number_format.qmin)).float().double()
    # A range of denormal width would make a step of zero.
    scale = scale.clamp(min=float(torch.finfo(torch.float32).tiny))
    zero_point = torch.round(-lows / scale).clamp(number_format.qmin, number_format.qmax)
    return scale, zero_point


def _range_errors(
    values: Tensor, counts: Tensor, lows: Tensor, highs: Tensor, number_format: NumberFormat
) -> Tensor:
    """Squared error of each range `[ranges]`, summed over a histogram `[bins]`."""
    scale, zero_point = _grid(lows, highs, number_format)
    codes = torch.round(values / scale[:, None]) + zero_point[:, None]
    codes = codes.clamp_(number_format.qmin, number_format.qmax)
    error = (codes - zero_point[:, None]) * scale[:, None] - values
    return error.square_() @ counts
