"""Weight scales: the step per channel that loses least, found on histograms."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fxmpq.formats import NumberFormat

_BINS = 2048
_STEPS = 96
_ROWS_AT_ONCE = 4096


def mse_weight_scales(weight: Tensor, formats: Sequence[NumberFormat], axis: int) -> list[Tensor]:
    """Find the scale per channel that minimises the squared rounding error.

    For every channel `c` and format of `b` bits it minimises
    `sum_k (w_ck - scale_c * clamp(round(w_ck / scale_c), qmin, qmax))^2` over 96 scales
    from 0.25 to 2 times `max|w_c| / 2^(b-1)`. The sum runs over a histogram of
    `w_c / max|w_c|` with 2048 bins, so the cost is one pass over the weights plus one small
    matrix product per format, whatever the number of scales tried. A 16-bit grid is finer
    than the bins and gains nothing from clipping: its scale is `max|w_c| / qmax`.

    Args:
        weight: Any shape of at least one dimension.
        formats: Symmetric formats.
        axis: The channel dimension.

    Returns:
        For each format a `float32` tensor of shape `[weight.shape[axis]]`; a channel of
        zeros has scale 1.

    Examples:
        >>> mse_weight_scales(torch.tensor([[-8.0, 3.0, 7.0]]), [NumberFormat(4)], 0)[0].round()
        tensor([1.])
    """
    rows = weight.detach().transpose(0, axis).reshape(weight.shape[axis], -1).float()
    peak = rows.abs().amax(dim=1)
    safe_peak = torch.where(peak > 0, peak, torch.ones_like(peak))
    searched = [number_format for number_format in formats if number_format.bits <= 8]
    tables = {entry: _error_table(entry, weight.device) for entry in searched}
    scales = {entry: safe_peak / entry.qmax for entry in formats}
    for start in range(0, rows.shape[0], _ROWS_AT_ONCE):
        part = slice(start, start + _ROWS_AT_ONCE)
        counts = _row_histograms(rows[part] / safe_peak[part, None])
        for number_format, (steps, errors) in tables.items():
            best = steps[(counts @ errors).argmin(dim=1)]
            scales[number_format][part] = best * safe_peak[part]
    # A channel of denormal values would make a scale of zero.
    tiny = torch.finfo(torch.float32).tiny
    ones = torch.ones_like(peak)
    return [torch.where(peak > 0, scales[entry].clamp(min=tiny), ones) for entry in formats]


def _row_histograms(unit_rows: Tensor) -> Tensor:
    """Count each row's values, which lie in `[-1, 1]`, in equal bins: `[rows, bins]`."""
    bins = ((unit_rows + 1) * (_BINS / 2)).long().clamp_(0, _BINS - 1)
    counts = torch.zeros(unit_rows.shape[0], _BINS, device=unit_rows.device)
    return counts.scatter_add_(1, bins, torch.ones_like(unit_rows))


def _error_table(number_format: NumberFormat, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the relative scales `[steps]` and the squared error of each bin: `[bins, steps]`."""
    steps = torch.linspace(0.25, 2.0, _STEPS, device=device) / (1 << (number_format.bits - 1))
    centres = (torch.arange(_BINS, device=device) + 0.5) * (2 / _BINS) - 1
    codes = torch.round(centres[:, None] / steps).clamp(number_format.qmin, number_format.qmax)
    return steps, (codes * steps - centres[:, None]).square()
