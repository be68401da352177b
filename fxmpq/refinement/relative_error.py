"""Relative squared error: how far outputs are from what they should be."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor


def relative_error(
    output: Callable[[int], Tensor], expected: Callable[[int], Tensor], batches: int
) -> float:
    """Relative squared error over all batches, `sum (y_q - y)^2 / sum y^2`.

    Args:
        output: Gives `y_q` of a batch by its number.
        expected: Gives `y`, in the same shape.
        batches: How many there are.

    Returns:
        0 where there is no difference, infinity where `y` is all zeros and `y_q` is not.

    Examples:
        >>> import torch
        >>> relative_error(lambda batch: torch.tensor([2.2]), lambda batch: torch.tensor([2.0]), 3)
        0.01...
    """
    noise = signal = 0.0
    for batch in range(batches):
        wanted = expected(batch)
        noise += float((output(batch) - wanted).square().sum())
        signal += float(wanted.square().sum())
    if noise == 0:
        return 0.0
    return noise / signal if signal > 0 else math.inf
