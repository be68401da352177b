"""What a range loses on a histogram: the L_p error, and the divergence of the distributions."""

from __future__ import annotations

import torch
from torch import Tensor

from fxmpq.formats import NumberFormat
from fxmpq.quantizers.floating import float_layout, round_to_float


def lp_losses(
    values: Tensor,
    counts: Tensor,
    scales: Tensor,
    zero_points: Tensor,
    number_format: NumberFormat,
    p: float,
) -> Tensor:
    """The L_p error of each range, `sum_i n_i |x_i - Q(x_i)|^p`.

    Args:
        values: Bin centres, shape `[bins]`.
        counts: Values in each bin, shape `[bins]`.
        scales: One step a range, shape `[ranges]`.
        zero_points: One a range, shape `[ranges]`.
        number_format: Affine, or a float's.
        p: The norm's exponent; 2 is the squared error.

    Returns:
        Shape `[ranges]`.

    Examples:
        >>> from fxmpq.formats import Scheme
        >>> values, ones = torch.tensor([0.0, 0.75, 5.0]), torch.ones(3)
        >>> lp_losses(values, ones, ones[:1], 0 * ones[:1], NumberFormat(2, Scheme.AFFINE), 2.0)
        tensor([4.0625])
    """
    rounded, _ = _rounded(values, scales, zero_points, number_format)
    error = rounded.mul_(scales[:, None]).sub_(values)
    return (error.square_() if p == 2 else error.abs_().pow_(p)) @ counts


def kl_losses(
    values: Tensor,
    counts: Tensor,
    scales: Tensor,
    zero_points: Tensor,
    number_format: NumberFormat,
) -> Tensor:
    """The Kullback-Leibler divergence of each range's distribution from the clipped one.

    `KL(P || Q) = sum_i P_i log(P_i / Q_i)`: `P` is the histogram after clipping, the values
    beyond the outermost codes' cells moved into the outermost bins that hold any; `Q` is what
    the codes keep of the values inside: each code's share, spread evenly over the bins in its
    cell that hold any. Coarse cells lose the shape inside them, narrow ranges pile up what
    they clip (Migacz 2017, the calibration of TensorRT, here for the cells of affine codes on
    both sides of 0).

    Args:
        values: Bin centres in ascending order, none of them empty, shape `[bins]`.
        counts: Values in each bin, shape `[bins]`; exact zeros are best left out, as their
            code keeps them exactly.
        scales: One step a range, shape `[ranges]`.
        zero_points: One a range, shape `[ranges]`.
        number_format: Affine, or a float's.

    Returns:
        Shape `[ranges]`, in nats, at least 0 up to rounding; infinite where a range holds no
        value.

    Examples:
        >>> from fxmpq.formats import Scheme
        >>> values, counts = torch.tensor([1.0, 2.0, 9.0]), torch.tensor([5.0, 5.0, 1.0])
        >>> scales = torch.tensor([1.0, 3.0])
        >>> kl_losses(values, counts, scales, 0 * scales, NumberFormat(2, Scheme.AFFINE))
        tensor([0.0041, 0.0000])
    """
    rounded, inside = _rounded(values, scales, zero_points, number_format)
    kept = counts * inside
    # Values ascend, so a cell begins wherever the rounded value changes.
    cells = torch.zeros_like(rounded, dtype=torch.long)
    cells[:, 1:] = (rounded[:, 1:] != rounded[:, :-1]).cumsum(dim=1)
    empty = counts.new_zeros(rounded.shape)
    mass = empty.scatter_add(1, cells, kept)
    bins = empty.scatter_add(1, cells, inside.to(kept.dtype))
    spread = mass.gather(1, cells) / bins.gather(1, cells).clamp(min=1)
    clipped = _pile_up(counts, kept, inside)
    ratio = torch.where(inside, clipped / spread, torch.ones_like(spread))
    divergence = (clipped * ratio.log()).sum(dim=1) / counts.sum()
    divergence += (kept.sum(dim=1) / counts.sum()).log()
    return torch.where(inside.any(dim=1), divergence, torch.full_like(divergence, torch.inf))


def _rounded(
    values: Tensor, scales: Tensor, zero_points: Tensor, number_format: NumberFormat
) -> tuple[Tensor, Tensor]:
    """What each range makes of the values, in units of its scale, and which it does not clip."""
    units = values / scales[:, None]
    if not number_format.is_integer:
        inside = units.abs() <= float_layout(number_format.scheme).largest
        return round_to_float(units, number_format.scheme).to(values.dtype), inside
    low, high = number_format.qmin - zero_points[:, None], number_format.qmax - zero_points[:, None]
    whole = units.round_()
    inside = (whole >= low) & (whole <= high)
    return torch.minimum(torch.maximum(whole, low), high), inside


def _pile_up(counts: Tensor, kept: Tensor, inside: Tensor) -> Tensor:
    """Move what lies outside into the outermost bins inside, for each range: `[ranges, bins]`."""
    place = torch.arange(len(counts), device=counts.device)
    first = inside.int().argmax(dim=1, keepdim=True)
    last = len(counts) - 1 - inside.flip(1).int().argmax(dim=1, keepdim=True)
    below = (counts * (place < first)).sum(dim=1, keepdim=True)
    above = (counts * (place > last)).sum(dim=1, keepdim=True)
    return kept.scatter_add(1, first, below).scatter_add(1, last, above)
