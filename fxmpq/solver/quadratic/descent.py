"""Good choices of a quadratic program: exchanges in one and in two groups, and restarts."""

from __future__ import annotations

import time

import numpy as np

from fxmpq.solver.quadratic.planes import Choices
from fxmpq.solver.relaxation import Floats, Indices

# With more options than this only single exchanges are tried.
_PAIRED = 1_000
_MOVED = 4
_REPAIRS = 100
_LEAST_GAIN = 1e-10
# All of a limit, with the rounding of its shares.
_FULL = 1 + 1e-12


def value(matrix: Floats, chosen: Indices) -> float:
    """`x^T M x` of a choice, given as the option of each group.

    Examples:
        >>> value(np.array([[1.0, -0.5], [-0.5, 2.0]]), np.array([0, 1]))
        2.0
    """
    return float(matrix[np.ix_(chosen, chosen)].sum())


def descended(matrix: Floats, choices: Choices, chosen: Indices) -> Indices:
    """Exchange the options of one group or of two, the greatest gain first, within the limits.

    Args:
        matrix: Symmetric, `[options, options]`.
        choices: The options.
        chosen: The option of each group, within all limits.

    Returns:
        A choice that no exchange improves, within the limits but for rounding.
    """
    found: Indices = chosen.copy()
    group = choices.group
    while True:
        before = found[group]
        pull = matrix[:, found].sum(axis=1)
        square = (
            matrix.diagonal()
            + matrix.diagonal()[before]
            - 2 * matrix[np.arange(len(before)), before]
        )
        single = 2 * (pull - pull[before]) + square
        cost = choices.costs - choices.costs[:, before]
        room = _FULL - choices.costs[:, found].sum(axis=1)
        fits = (cost <= room[:, None]).all(axis=0)
        gains = np.where(fits, single, np.inf)
        first = second = int(gains.argmin())
        best = float(gains[first])
        if len(matrix) <= _PAIRED:
            mixed = matrix - matrix[:, before] - matrix[before] + matrix[np.ix_(before, before)]
            both = single[:, None] + single + 2 * mixed
            both[group[:, None] == group] = np.inf
            for taken, left in zip(cost, room, strict=True):
                both[taken[:, None] + taken > left] = np.inf
            if float(both.min()) < best:
                first, second = map(int, divmod(int(both.argmin()), len(matrix)))
                best = float(both[first, second])
        if best >= -_LEAST_GAIN * abs(value(matrix, found)):
            return found
        found[group[[first, second]]] = [first, second]


def restarted(
    matrix: Floats, choices: Choices, chosen: Indices, *, restarts: int, deadline: float
) -> Indices:
    """Change a few groups at random, repair what exceeds a limit, and descend again; keep the best.

    Args:
        matrix: Symmetric, `[options, options]`.
        choices: The options.
        chosen: The option of each group, within all limits.
        restarts: How often.
        deadline: Reading of `time.monotonic` at which to stop.

    Returns:
        The best choice found; the seed is fixed.
    """
    generator = np.random.default_rng(0)
    best = descended(matrix, choices, chosen)
    least = value(matrix, best)
    for _ in range(restarts):
        if time.monotonic() >= deadline:
            break
        moved = best.copy()
        count = min(_MOVED, len(moved))
        for place in generator.choice(len(moved), count, replace=False):
            moved[place] = choices.starts[place] + generator.integers(choices.sizes[place])
        repaired = _repaired(choices, moved, generator)
        if repaired is None:
            continue
        found = descended(matrix, choices, repaired)
        reached = value(matrix, found)
        if reached < least:
            best, least = found, reached
    return best


def _repaired(choices: Choices, chosen: Indices, generator: np.random.Generator) -> Indices | None:
    """Lower the worst limit in random groups until all limits are kept."""
    for _ in range(_REPAIRS):
        used = choices.costs[:, chosen].sum(axis=1)
        if (used <= _FULL).all():
            return chosen
        costs = choices.costs[int(used.argmax())]
        place = int(generator.integers(len(chosen)))
        start = int(choices.starts[place])
        options = np.arange(start, start + choices.sizes[place])
        cheaper = options[costs[options] < costs[chosen[place]]]
        if len(cheaper):
            chosen[place] = generator.choice(cheaper)
    return None
