"""The mean of what enters a layer, kept per position so that bias correction is exact."""

from __future__ import annotations

import torch
from torch import Tensor


class MeanInput:
    """Sums a layer's inputs over samples, one map for each shape that occurs.

    A layer is linear, so the mean of its outputs is its output on the mean input; keeping
    the map (and not one number per channel) makes this exact at padded borders too.

    Examples:
        >>> mean = MeanInput()
        >>> mean.update(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        >>> [(total.tolist(), count) for total, count in mean.totals()]
        [([4.0, 6.0], 2)]
    """

    def __init__(self) -> None:
        self._sums: dict[tuple[int, ...], Tensor] = {}
        self._counts: dict[tuple[int, ...], int] = {}

    def update(self, x: Tensor) -> None:
        """Add a batch, shape `[samples, ...]`, to the sums."""
        shape = tuple(x.shape[1:])
        total = x.detach().sum(dim=0, dtype=torch.float32)
        self._sums[shape] = self._sums[shape] + total if shape in self._sums else total
        self._counts[shape] = self._counts.get(shape, 0) + x.shape[0]

    def totals(self) -> list[tuple[Tensor, int]]:
        """For each shape seen: the sum over samples, shape `[...]`, and their number."""
        return [(total, self._counts[shape]) for shape, total in self._sums.items()]
