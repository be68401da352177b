"""Scales of short blocks: the ones that lose least, by trying each on the values themselves."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fxmpq.formats import NumberFormat, ScaleKind
from fxmpq.quantizers.codes import round_in_place
from fxmpq.quantizers.floating import exponent_of, float_layout, power_of_two
from fxmpq.quantizers.scales import e4m3_tensor_scale, round_to_e4m3_scale

_TRIALS = 48
_RATIOS, _WIDE_RATIOS = (0.25, 2.0), (0.8, 1.1)
_VALUES_AT_ONCE = 1 << 16
_SMALLEST = float(torch.finfo(torch.float32).tiny)


def unit_scale(peak: Tensor, number_format: NumberFormat) -> Tensor:
    """The scale at which the peak magnitude is the format's largest: where searches begin.

    `peak / 2^(bits - 1)` for integers, whose negative half is larger by one, and the peak
    divided by the largest finite value for floats.
    """
    if number_format.is_integer:
        return peak / (1 << (number_format.bits - 1))
    return peak / float_layout(number_format.scheme).largest


def block_scales(rows: Tensor, number_format: NumberFormat, *, p: float = 2.0) -> Tensor:
    """Find the scale of each row that minimises its rounding error, squared or to the power `p`.

    For every row `r` it minimises `sum_k |w_rk - s_r Q(w_rk / s_r)|^p`, with `Q` rounding to the
    format's numbers, over the scales that can be stored: 48 from 0.25 to 2 times `unit_scale`
    (integers of 7 and 8 bits gain nothing from clipping much: from 0.8 to 1.1), rounded to E4M3
    where the format asks for it (NVFP4), and for power-of-two scales (MX) the three around the
    peak, among which is the one that the OCP specification prescribes.

    Args:
        rows: Finite, shape `[rows, values]`, at least one row of one value.
        number_format: Symmetric up to 8 bits, or of a float.
        p: The norm's exponent.

    Returns:
        `float32`, shape `[rows]`; a row of zeros has a positive one.

    Examples:
        >>> from fxmpq.formats import Precision
        >>> block_scales(torch.tensor([[6.0, -3.0, 1.0, 0.5]]), Precision.parse("we2m1b32").weight)
        tensor([1.])
    """
    rows = rows.float()
    peak = rows.abs().amax(dim=1)
    if not peak.any():
        return torch.ones_like(peak)
    base = unit_scale(peak, number_format).clamp(min=_SMALLEST)
    base = torch.where(peak > 0, base, base.amax())
    tensor_scale = e4m3_tensor_scale(base)
    found = []
    step = max(_VALUES_AT_ONCE // rows.shape[1], 1)
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        trials = _trials(base[part], tensor_scale, number_format)
        found.append(_best(rows[part], trials, number_format, p))
    return torch.cat(found)


def _trials(unit: Tensor, tensor_scale: Tensor, number_format: NumberFormat) -> Iterator[Tensor]:
    """Scales to try for every row, each of the kind that the format stores."""
    kind = number_format.scale_kind
    if kind is ScaleKind.E8M0:
        below = exponent_of(unit)
        for offset in range(3):
            yield power_of_two((below + offset).clamp(max=127))
        return
    is_wide = number_format.is_integer and number_format.bits > 6
    low, high = _WIDE_RATIOS if is_wide else _RATIOS
    for index in range(_TRIALS):
        trial = unit * (low + (high - low) * index / (_TRIALS - 1))
        if kind is ScaleKind.E4M3:
            trial = round_to_e4m3_scale(trial, tensor_scale)
        yield trial.clamp(min=_SMALLEST)


def _best(rows: Tensor, trials: Iterator[Tensor], number_format: NumberFormat, p: float) -> Tensor:
    best = rows.new_ones(len(rows))
    least = torch.full_like(best, torch.inf)
    # Errors count relative to the row's power of two: powers of huge and tiny ones would be
    # infinite or zero.
    peak = rows.abs().amax(dim=1).clamp(min=_SMALLEST)
    unit = power_of_two(exponent_of(peak))[:, None]
    rows = rows / unit
    for trial in trials:
        scale = trial[:, None] / unit
        rounded = round_in_place(rows / scale, number_format).mul_(scale)
        difference = rounded.sub_(rows)
        error = (difference.square_() if p == 2 else difference.abs_().pow_(p)).sum(dim=1)
        better = error < least
        best, least = torch.where(better, trial, best), torch.where(better, error, least)
    return best
