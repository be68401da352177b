"""Weight scales: the step per row of values that loses least, found on histograms."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from fxmpq.formats import NumberFormat, ScaleKind
from fxmpq.granularity import PerBlock
from fxmpq.quantizers.block_scale import block_scales, unit_scale
from fxmpq.quantizers.codes import round_in_place
from fxmpq.quantizers.rule import Rule, RuleOption
from fxmpq.quantizers.scale_refinement import refine_scales
from fxmpq.quantizers.scales import scale_rows, scale_shape, storable_scale_above

_BINS = 2048
_STEPS = 96
_LOW_STEPS = 16
_ROWS_AT_ONCE = 4096
_LONGEST_SHORT = 128


def mse_weight_scales(
    weight: Tensor, formats: Sequence[NumberFormat], axis: int, *, p: float = 2.0
) -> list[Tensor]:
    """Find the scales of least rounding error, squared or in another L_p norm.

    For every row `r` of values that share a scale (a channel, a block, or the whole tensor) and
    every format it minimises `sum_k |w_rk - scale_r * Q(w_rk / scale_r)|^p`, where `Q` rounds to
    the format's numbers: `clamp(round(u), qmin, qmax)` for integers. It tries 112 scales from
    1/32 to 2 times `unit_scale`, which is `max|w_r| / 2^(b-1)` for integers of `b` bits. The sum
    runs over a histogram of `w_r / max|w_r|` with 2048 bins, so the cost is one pass over the
    weights plus one small matrix product per format, whatever the number of scales tried. The
    best is refined on the values themselves (`refine_scales`), beside the scale that clips
    nothing, so that it is never worse. A 16-bit grid is finer than the bins and gains nothing
    from clipping: its scale is `max|w_r| / qmax`. Blocks of up to 128 values are shorter than
    their histograms and searched by `block_scales`.

    Args:
        weight: Any shape of at least one dimension.
        formats: Symmetric and float formats.
        axis: The channel dimension.
        p: The norm's exponent, positive; 2 is the squared error.

    Returns:
        For each format a `float32` tensor in the shape that `scale_shape` gives; a channel of
        zeros has scale 1.

    Examples:
        >>> mse_weight_scales(torch.tensor([[-8.0, 3.0, 7.0]]), [NumberFormat(4)], 0)
        [tensor([1.])]
    """
    found: dict[NumberFormat, Tensor] = {}
    for granularity in dict.fromkeys(entry.granularity for entry in formats):
        alike = [entry for entry in formats if entry.granularity == granularity]
        shape = scale_shape(weight.shape, axis, granularity)
        rows = scale_rows(weight.detach(), axis, granularity).float()
        for entry, scale in zip(alike, _row_scales(rows, alike, p), strict=True):
            found[entry] = scale.reshape(shape)
    return [found[entry] for entry in formats]


def _row_scales(rows: Tensor, formats: Sequence[NumberFormat], p: float) -> list[Tensor]:
    """Scales of rows `[rows, values]` in formats of one granularity, each `[rows]`."""
    if not rows.numel():
        return [rows.new_ones(len(rows)) for _ in formats]
    peak = rows.abs().amax(dim=1)
    safe_peak = torch.where(peak > 0, peak, torch.ones_like(peak))
    units = rows / safe_peak[:, None]
    searched = [entry for entry in formats if entry.bits <= 8]
    scales = {entry: safe_peak / entry.qmax for entry in formats}
    if isinstance(formats[0].granularity, PerBlock) and rows.shape[1] <= _LONGEST_SHORT:
        scales |= {entry: _block_scales(rows, units, safe_peak, entry, p) for entry in searched}
        searched = []
    for entry, found in _histogram_scales(units, searched, p).items():
        starts = [found, _unclipped(units, entry)]
        scales[entry] = refine_scales(units, starts, entry, p=p) * safe_peak
    # A channel of denormal values would make a scale of zero.
    tiny = torch.finfo(torch.float32).tiny
    ones = torch.ones_like(peak)
    return [
        torch.where(peak > 0, scales[entry], ones).clamp(min=tiny)
        if entry.scale_kind is ScaleKind.FLOAT32
        else scales[entry]
        for entry in formats
    ]


def _block_scales(
    rows: Tensor, units: Tensor, peak: Tensor, number_format: NumberFormat, p: float
) -> Tensor:
    """Scales of short blocks, those in `float32` fitted to their codes."""
    scales = block_scales(rows, number_format, p=p)
    if number_format.scale_kind is not ScaleKind.FLOAT32:
        return scales
    return refine_scales(units, [scales / peak], number_format, p=p, trials=False) * peak


def _histogram_scales(
    units: Tensor, formats: Sequence[NumberFormat], p: float
) -> dict[NumberFormat, Tensor]:
    """The best of the tables' scales for rows of peak 1, each `[rows]`."""
    tables = {entry: _error_table(entry, units.device, p) for entry in formats}
    found: dict[NumberFormat, list[Tensor]] = {entry: [] for entry in formats}
    for part in torch.split(units, _ROWS_AT_ONCE) if formats else ():
        counts = _row_histograms(part)
        for number_format, (steps, errors) in tables.items():
            found[number_format].append(steps[(counts @ errors).argmin(dim=1)])
    return {entry: torch.cat(parts) for entry, parts in found.items()}


def _row_histograms(unit_rows: Tensor) -> Tensor:
    """Count each row's values, which lie in `[-1, 1]`, in equal bins: `[rows, bins]`."""
    bins = ((unit_rows + 1) * (_BINS / 2)).long().clamp_(0, _BINS - 1)
    counts = torch.zeros(unit_rows.shape[0], _BINS, device=unit_rows.device)
    return counts.scatter_add_(1, bins, torch.ones_like(unit_rows))


def _error_table(
    number_format: NumberFormat, device: torch.device, p: float
) -> tuple[Tensor, Tensor]:
    """Return the relative scales `[steps]` and the L_p error of each bin: `[bins, steps]`."""
    unit = unit_scale(torch.ones((), device=device), number_format)
    # Few bits clip a far outlier: 16 scales go down from a quarter to 1/32.
    low = torch.exp2(torch.linspace(-5, -2, _LOW_STEPS + 1, device=device)[:-1])
    steps = torch.cat([low, torch.linspace(0.25, 2.0, _STEPS, device=device)]) * unit
    centres = (torch.arange(_BINS, device=device) + 0.5) * (2 / _BINS) - 1
    numbers = round_in_place(centres[:, None] / steps, number_format)
    error = numbers * steps - centres[:, None]
    return steps, error.square() if p == 2 else error.abs().pow(p)


def minmax_weight_scales(
    weight: Tensor, formats: Sequence[NumberFormat], axis: int
) -> list[Tensor]:
    """The smallest scales that can be stored at which no weight is clipped.

    `max(max(w_r) / qmax, min(w_r) / qmin)` for integers, whose negative half reaches further, and
    `max|w_r|` over the largest finite value for floats; E8M0 and E4M3 scales are rounded up.

    Args:
        weight: Any shape of at least one dimension.
        formats: Symmetric and float formats.
        axis: The channel dimension.

    Returns:
        As `mse_weight_scales`.

    Examples:
        >>> minmax_weight_scales(torch.tensor([[-8.0, 3.0, 3.5]]), [NumberFormat(4)], 0)
        [tensor([1.])]
    """
    found = []
    for entry in formats:
        rows = scale_rows(weight.detach(), axis, entry.granularity).float()
        shape = scale_shape(weight.shape, axis, entry.granularity)
        scale = rows.new_ones(len(rows)) if not rows.numel() else _unclipped(rows, entry)
        found.append(storable_scale_above(scale, entry).reshape(shape))
    return found


def _unclipped(rows: Tensor, number_format: NumberFormat) -> Tensor:
    """The smallest scale of each row that clips nothing; 1 for zeros."""
    low, high = rows.amin(dim=1), rows.amax(dim=1)
    if number_format.is_integer:
        scale = torch.maximum(high / number_format.qmax, low / number_format.qmin)
    else:
        scale = unit_scale(torch.maximum(-low, high), number_format)
    # Denormal values would make a scale of zero.
    scale = scale.clamp(min=torch.finfo(torch.float32).tiny)
    return torch.where((low == 0) & (high == 0), torch.ones_like(scale), scale)


FindScales = Callable[..., list[Tensor]]

WEIGHT_SCALES: Mapping[str, Rule[FindScales]] = {
    "minmax": Rule(minmax_weight_scales),
    "mse": Rule(mse_weight_scales, {"p": RuleOption(2.0, above=0)}),
}
"""Called with `(weight, formats, axis, **options)`."""
