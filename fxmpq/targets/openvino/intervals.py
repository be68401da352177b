"""The ends of a quantization's interval, written so that rounding moves no step.

The runtime is told of an interval and computes from it, in `float32`, the factor and the shift with
which it quantizes. Ends that are rounded one by one give a shift that is off by 1e-5 of a step: as
many values then fall on the other side of a step, as if an arithmetic of eighteen bits computed
the network. Ends a few units in the last place away give a shift that is the zero point.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Ends = NDArray[np.float32]

_NEAR = 8
"""Units in the last place that an end may be moved by."""


def interval(scale: float, zero_point: int, levels: int) -> tuple[np.float32, np.float32]:
    """The interval of a grid from which `float32` arithmetic gets the grid back.

    The ends `a` and `b` are at most 8 units in the last place from `-z s` and `(n - z) s`, where
    `n = levels - 1`. Of these, they minimise how far steps are moved at codes a quarter of the
    range from zero's, `|shift - z| + n / 4 |factor s - 1|` in steps. The factor is `n / (b - a)`,
    the shift `-a n / (b - a)` in front of integer kernels and `-a` times the factor elsewhere,
    each operation rounded to `float32`; the sum over both shifts is minimised.

    Args:
        scale: The step `s`.
        zero_point: The code `z` of 0.0, in `[0, levels - 1]`.
        levels: Number of codes.

    Returns:
        Both ends. An end that is 0 stays 0.

    Examples:
        >>> low, high = interval(0.05, 139, 256)
        >>> float(-low * np.float32(255) / (high - low))
        139.0
    """
    most = np.float32(levels - 1)
    lows = _around(-zero_point * scale)[:, None]
    highs = _around((levels - 1 - zero_point) * scale)[None]
    # Ranges near the largest numbers overflow in the runtime as they do here.
    with np.errstate(over="ignore", invalid="ignore"):
        width = highs - lows
        factor = most / width
        shifts = (-lows * most / width, -lows * factor)
    stretched = np.abs(factor.astype(np.float64) * scale - 1)
    moved = sum(np.abs(shift.astype(np.float64) - zero_point) for shift in shifts)
    error = np.nan_to_num(moved + (levels - 1) / 4 * stretched, nan=np.inf)
    low, high = np.unravel_index(error.argmin(), error.shape)
    return lows[low, 0], highs[0, high]


def _around(value: float) -> Ends:
    """The `float32` numbers around a value; bit patterns of one sign are in their order."""
    nearest = np.array([value], np.float32)
    if value == 0:
        return nearest
    found: Ends = (nearest.view(np.int32) + np.arange(-_NEAR, _NEAR + 1, dtype=np.int32)).view(
        np.float32
    )
    return found
