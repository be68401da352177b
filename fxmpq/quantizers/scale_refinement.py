"""Refining weight scales: from one found on a histogram to one that is best on the values."""

from __future__ import annotations

import torch
from torch import Tensor

from fxmpq.formats import NumberFormat
from fxmpq.quantizers.codes import round_in_place

_VALUES_AT_ONCE = 1 << 17
_TRIALS_PER_VALUE = 1 << 13
_MOST_TRIALS = 512
_FEWEST_TRIALS = 4
_SPACING = 0.002
_FITS = 2
_SMALLEST = float(torch.finfo(torch.float32).tiny)


def refine_scales(
    rows: Tensor,
    starts: list[Tensor],
    number_format: NumberFormat,
    *,
    p: float = 2.0,
    trials: bool = True,
) -> Tensor:
    """Lower the exact L_p error of each row, `sum_k |w_k - s Q(w_k / s)|^p`, from several starts.

    The best start is followed by the scales around it, 0.2 % apart: as many as 8,192 over the
    row's length, 512 at most, for the error of a short row jumps with each of its values. Then the
    scale is fitted to the codes that it gave, `s = <w, q> / <q, q>`, twice. Whatever is best of
    all that was tried is returned, so the error is never above that of a start.

    Args:
        rows: Values that share a scale, shape `[rows, values]`.
        starts: Positive scales to begin with, each `[rows]`.
        number_format: Symmetric, or of a float; its scales are `float32`.
        p: The norm's exponent; 2 is the squared error.
        trials: Whether to try the scales around the best start. Up to 4 bits the fit alone gets
            as far, and they are left out.

    Returns:
        `float32`, shape `[rows]`.

    Examples:
        >>> row = torch.tensor([[0.3, 0.6, 0.95]])
        >>> refine_scales(row, [torch.tensor([0.4])], NumberFormat(4))
        tensor([0.3107])
    """
    size = rows.shape[1]
    count = min(_TRIALS_PER_VALUE // size, _MOST_TRIALS)
    if not trials or number_format.bits <= 4 or count < _FEWEST_TRIALS:
        count = 0
    step = max(_VALUES_AT_ONCE // size, 1)
    parts = [torch.split(start, step) for start in starts]
    found = []
    for index, part in enumerate(torch.split(rows, step)):
        search = _RowSearch(part, number_format, p)
        for start in parts:
            search.attempt(start[index])
        centre = search.best
        for trial in range(-(count // 2), count - count // 2):
            search.attempt(centre * (1 + _SPACING * trial))
        for _ in range(_FITS):
            search.attempt(search.fitted())
        found.append(search.best)
    return torch.cat(found)


class _RowSearch:
    """The best scale of each row so far."""

    def __init__(self, rows: Tensor, number_format: NumberFormat, p: float) -> None:
        self._rows = rows
        self._format = number_format
        self._p = p
        self.best = rows.new_ones(len(rows))
        self._least = torch.full_like(self.best, torch.inf)

    def attempt(self, scale: Tensor) -> None:
        """Take the scale in the rows where its error is less."""
        scale = scale.clamp(min=_SMALLEST)
        spread = scale[:, None]
        error = round_in_place(self._rows / spread, self._format).mul_(spread).sub_(self._rows)
        total = (error.square_() if self._p == 2 else error.abs_().pow_(self._p)).sum(dim=1)
        better = total < self._least
        self.best = torch.where(better, scale, self.best)
        self._least = torch.where(better, total, self._least)

    def fitted(self) -> Tensor:
        """The scale of least squared error for the codes that the best one gives."""
        numbers = round_in_place(self._rows / self.best[:, None], self._format)
        power = numbers.square().sum(dim=1)
        fit = (self._rows * numbers).sum(dim=1) / power
        return torch.where((power > 0) & (fit > 0), fit, self.best)
