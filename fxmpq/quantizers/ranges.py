"""Activation ranges: the scale and zero point of one tensor, found on a histogram by a rule.

Every rule takes `is_symmetric`: whether the zero point is to be the middle of affine codes,
`2^(bits - 1)`, so that `code - zero_point` is a signed code. Floats have no zero point anyway.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fxmpq.formats import NumberFormat
from fxmpq.quantizers.grids import SMALLEST_SCALE, grids, middle_code
from fxmpq.quantizers.histogram import StreamingHistogram
from fxmpq.quantizers.range_losses import kl_losses, lp_losses
from fxmpq.quantizers.rule import Rule, RuleOption

_SHRINKING = torch.exp2(-torch.arange(0, 57, dtype=torch.float64) / 8)
_NEAR = torch.exp2(torch.arange(-40, 41, dtype=torch.float64) / 96)
_NEARER = torch.exp2(torch.arange(-20, 21, dtype=torch.float64) / 960)

# (values, counts, scales, zero_points, number_format) -> one loss a range
Losses = Callable[[Tensor, Tensor, Tensor, Tensor, NumberFormat], Tensor]


@dataclass(frozen=True)
class ActivationRange:
    """The grid of one tensor: `x = scale * (code - zero_point)`.

    Codes of a float format stand for small floats, and their zero point is 0.

    Args:
        scale: Positive step, rounded to `float32`, in which runtimes hold it.
        zero_point: The code of 0.0.
    """

    scale: float
    zero_point: int


def minmax(
    histogram: StreamingHistogram, number_format: NumberFormat, *, is_symmetric: bool = False
) -> ActivationRange:
    """The whole range, from the smallest value to the largest: nothing is clipped.

    Args:
        histogram: At least one batch of values.
        number_format: Affine, or a float's.
        is_symmetric: Whether the zero point is the middle of the codes.

    Examples:
        >>> from fxmpq.formats import Scheme
        >>> histogram = StreamingHistogram()
        >>> histogram.update(torch.tensor([-1.0, 2.0]))
        >>> minmax(histogram, NumberFormat(2, Scheme.AFFINE))
        ActivationRange(scale=1.0, zero_point=1)
    """
    return _range(*_span(histogram), number_format, is_symmetric)


def percentile(
    histogram: StreamingHistogram,
    number_format: NumberFormat,
    *,
    percentile: float = 99.99,
    is_symmetric: bool = False,
) -> ActivationRange:
    """The range between two percentiles: `[q_(100 - percentile), q_percentile]` of the values.

    A percentile is known to the histogram's bin, 1/4096 to 1/2048 of the whole range; 100 is
    the whole range exactly. Where both ends are 0, the whole range is taken.

    Args:
        histogram: At least one batch of values.
        number_format: Affine, or a float's.
        percentile: In `(50, 100]`; values beyond are clipped, on each side.
        is_symmetric: Whether the zero point is the middle of the codes.
    """
    low, high = _span(histogram)
    above = _quantile(histogram, percentile / 100)
    below = _quantile(histogram, 1 - percentile / 100)
    clipped = (max(low, min(0.0, below)), min(high, max(0.0, above)))
    low, high = clipped if clipped[0] < clipped[1] else (low, high)
    return _range(low, high, number_format, is_symmetric)


def sigma(
    histogram: StreamingHistogram,
    number_format: NumberFormat,
    *,
    k: float = 3.5,
    is_symmetric: bool = False,
) -> ActivationRange:
    """The range within `k` deviations of the mean: `[mean - k sigma, mean + k sigma]`.

    The bounds of a bounded ReLU (arXiv:2006.11735). Mean and deviation are those of
    all values of the tensor, zeros included; the range never exceeds the whole one.

    Args:
        histogram: At least one batch of values.
        number_format: Affine, or a float's.
        k: Positive.
        is_symmetric: Whether the zero point is the middle of the codes.
    """
    low, high = _span(histogram)
    reach = k * histogram.variance**0.5
    low = max(low, min(0.0, histogram.mean - reach))
    high = min(high, max(0.0, histogram.mean + reach))
    return _range(low, high, number_format, is_symmetric)


def mse(
    histogram: StreamingHistogram,
    number_format: NumberFormat,
    *,
    p: float = 2.0,
    is_symmetric: bool = False,
) -> ActivationRange:
    """The range of least L_p error, `sum_i n_i |x_i - Q(x_i)|^p` over the histogram.

    Ranges `[r_l * min, r_h * max]` are tried first: both ends shrink together (57 ratios from 1
    to 1/128), then each alone. Then come scales around the best, up to a third larger or smaller,
    with its zero point and the codes beside it: a few codes lose much less where they meet a
    frequent value, such as the background of images, and the range may reach beyond the values
    for that. With `p=2` this is the squared error; a larger `p` weighs clipped values more (Nahshan
    et al. 2019, arXiv:1911.07190, choose it by the loss).

    Args:
        histogram: At least one batch of values.
        number_format: Affine, or a float's.
        p: The norm's exponent, positive.
        is_symmetric: Whether the zero point is the middle of the codes: both ends then shrink
            together only.

    Examples:
        >>> from fxmpq.formats import Scheme
        >>> histogram = StreamingHistogram()
        >>> histogram.update(torch.linspace(0, 1, 1001))
        >>> mse(histogram, NumberFormat(8, Scheme.AFFINE)).zero_point
        0
    """
    kept = histogram.counts > 0
    values, counts = histogram.centres[kept], histogram.counts[kept]
    losses = partial(lp_losses, p=p)
    return _search(histogram, values, counts, number_format, losses, is_symmetric=is_symmetric)


def kl(
    histogram: StreamingHistogram, number_format: NumberFormat, *, is_symmetric: bool = False
) -> ActivationRange:
    """The range whose codes keep most of the distribution: least Kullback-Leibler divergence.

    The same ranges are tried as by `mse`, but for those that reach further than `minmax` does (by
    more than the half step that zero is moved to lie on a code); `kl_losses` says what is
    compared. Exact zeros count for nothing, since their code keeps them exactly. A 16-bit grid is
    finer than the bins and has nothing to gain: it takes the whole range. How far a clipped value
    moves does not count, so at few bits a tensor with another frequent value (the background of
    normalised images) can be clipped to almost nothing: take `mse` there.

    Args:
        histogram: At least one batch of values.
        number_format: Affine, or a float's.
        is_symmetric: Whether the zero point is the middle of the codes.
    """
    whole = minmax(histogram, number_format, is_symmetric=is_symmetric)
    counts = histogram.counts.clone()
    counts[_zero_bin(histogram)] -= histogram.zeros
    kept = counts > 0
    if number_format.bits > 8 or not kept.any():
        return whole
    values = histogram.centres[kept]
    found = histogram, values, counts[kept], number_format, kl_losses
    return _search(*found, is_symmetric=is_symmetric, is_within=True)


def _span(histogram: StreamingHistogram) -> tuple[float, float]:
    """The whole range, 0 included."""
    return min(0.0, histogram.minimum), max(0.0, histogram.maximum)


def _quantile(histogram: StreamingHistogram, share: float) -> float:
    """The value that a share of all values does not exceed, linear inside a bin."""
    if share >= 1 or share <= 0 or histogram.width == 0:
        return histogram.maximum if share > 0 else histogram.minimum
    up_to = histogram.counts.cumsum(0)
    wanted = share * up_to[-1]
    index = int((up_to >= wanted).int().argmax())
    zeros = histogram.zeros if index == _zero_bin(histogram) else 0.0
    others = float(histogram.counts[index]) - zeros
    left = float(up_to[index] - wanted)
    if left >= others:
        return 0.0
    return float(histogram.centres[index]) + (0.5 - left / others) * histogram.width


def _zero_bin(histogram: StreamingHistogram) -> int:
    """The bin that begins at 0, where exact zeros are counted first."""
    return int((histogram.centres > 0).int().argmax())


def _range(
    low: float, high: float, number_format: NumberFormat, is_symmetric: bool
) -> ActivationRange:
    if low == high:
        return ActivationRange(1.0, middle_code(number_format) if is_symmetric else 0)
    ends = torch.tensor([[low], [high]], dtype=torch.float64)
    scale, zero_point = grids(ends[0], ends[1], number_format, is_symmetric)
    return ActivationRange(float(scale), int(zero_point))


def _search(
    histogram: StreamingHistogram,
    values: Tensor,
    counts: Tensor,
    number_format: NumberFormat,
    losses: Losses,
    *,
    is_symmetric: bool,
    is_within: bool = False,
) -> ActivationRange:
    """The range of least loss on the values; the whole one unless another is better.

    It may reach beyond the values unless it is to stay within them.
    """
    low, high = _span(histogram)
    whole = minmax(histogram, number_format, is_symmetric=is_symmetric)
    if low == high:
        return whole
    grids_of = partial(grids, number_format=number_format, is_symmetric=is_symmetric)
    has_one_zero_point = is_symmetric and number_format.is_integer
    has_two_ends = low < 0 < high and not has_one_zero_point
    # Kept where every loss is infinite, as of a large norm or of one value in a float format.
    best, least = (whole.scale, float(whole.zero_point)), float("inf")

    def attempt(scales: Tensor, zero_points: Tensor) -> int:
        nonlocal best, least
        found = losses(values, counts, scales, zero_points, number_format)
        index = int(found.argmin())
        if float(found[index]) < least:
            least = float(found[index])
            best = float(scales[index]), float(zero_points[index])
        return index

    shared = attempt(*grids_of(low * _SHRINKING, high * _SHRINKING))
    ratios = torch.full_like(_SHRINKING, float(_SHRINKING[shared]))
    if has_two_ends:
        kept = attempt(*grids_of(low * ratios, high * _SHRINKING))
        ratios = torch.full_like(_SHRINKING, float(_SHRINKING[kept]))
        attempt(*grids_of(low * _SHRINKING, high * ratios))
    for factors in (_NEAR, _NEARER):
        scale, zero_point = best
        for zero in _neighbours(zero_point, number_format) if has_two_ends else (zero_point,):
            scales = (scale * factors).float().double()
            if is_within:
                scales = scales.clamp(max=whole.scale)
                if has_two_ends and number_format.is_integer:
                    scales = scales.clamp(max=_largest_within(low, high, zero, number_format))
            scales = scales.clamp(min=SMALLEST_SCALE)
            attempt(scales, torch.full_like(scales, zero))
    return ActivationRange(best[0], int(best[1]))


def _neighbours(zero_point: float, number_format: NumberFormat) -> list[float]:
    """Zero points to try where both signs occur: the codes beside it too, but for floats."""
    if not number_format.is_integer:
        return [zero_point]
    around = (zero_point, zero_point - 1, zero_point + 1)
    return [zero for zero in around if number_format.qmin <= zero <= number_format.qmax]


def _largest_within(low: float, high: float, zero: float, number_format: NumberFormat) -> float:
    """The largest scale whose outermost codes lie at most half a step beyond either end."""
    below, above = zero - number_format.qmin, number_format.qmax - zero
    return min(
        -low / (below - 0.5) if below > 0 else math.inf,
        high / (above - 0.5) if above > 0 else math.inf,
    )


FindRange = Callable[..., ActivationRange]
RangeRule = Rule[FindRange]
"""Called with `(histogram, number_format, **options)`, and `is_symmetric`."""

RANGES: Mapping[str, RangeRule] = {
    "minmax": Rule(minmax),
    "percentile": Rule(percentile, {"percentile": RuleOption(99.99, above=50, at_most=100)}),
    "mse": Rule(mse, {"p": RuleOption(2.0, above=0)}),
    "kl": Rule(kl),
    "sigma": Rule(sigma, {"k": RuleOption(3.5, above=0)}),
}
