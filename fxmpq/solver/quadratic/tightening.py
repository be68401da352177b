"""The root of the quadratic program: as convex as it can be made, and the options that remain."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from fxmpq.solver.quadratic.convexity import best_blocks, convexified
from fxmpq.solver.quadratic.planes import Choices, Quadratic, best_plane
from fxmpq.solver.relaxation import Floats, Indices

_ROUNDS = 12
# Rounds end when two in a row neither close this share of the gap nor drop this share of options.
_WORTHWHILE = 0.03
# The first point is moved towards even shares: the relaxation of the function as given says
# little about where the better one will mix.
_SPREAD = 0.1
# Programs with more options get only this many rounds, which take seconds each.
_LARGE = 500
_ROUNDS_OF_LARGE = 3


@dataclass(frozen=True)
class Tightened:
    """What is left of a program.

    Args:
        kept: The options that a better choice may have, by their place in the program.
        choices: The same; `None` if there is no better choice.
        function: Equal to the objective at every choice, convex, with a good relaxation.
        point: Where the relaxation is least.
        bound: No choice has a smaller value, or none below the ceiling if nothing is left.
        planes: How many relaxations were solved.
    """

    kept: Indices
    choices: Choices | None
    function: Quadratic
    point: Floats
    bound: float
    planes: int


def tightened(
    matrix: Floats, choices: Choices, *, ceiling: float, enough: float, deadline: float
) -> Tightened:
    """Convexify and rule out options in turns, while either helps.

    Args:
        matrix: `M` of the objective `x^T M x`, positive semi-definite.
        choices: The options.
        ceiling: Only choices of a smaller value matter.
        enough: Bound at which to stop.
        deadline: Reading of `time.monotonic` at which to stop.

    Returns:
        The options left and the best convex form found.
    """
    kept = np.arange(len(matrix))
    blocks = np.zeros_like(matrix)
    function = Quadratic(matrix, np.zeros(len(matrix)), 0.0)
    best = Tightened(kept, choices, function, choices.even, 0.0, 0)
    best_so_far, idle, mixed = blocks, 0, None
    rounds = _ROUNDS if len(matrix) <= _LARGE else _ROUNDS_OF_LARGE
    for turn in range(rounds):
        plane = best_plane(function, choices, enough, deadline=deadline)
        gap, count = ceiling - best.bound, len(kept)
        gained = plane.bound - best.bound
        if turn == 0 or gained > 0:
            bound = max(plane.bound, best.bound)
            best = Tightened(kept, choices, function, plane.point, bound, turn + 1)
            best_so_far = blocks
        stays = choices.room() & (plane.bound + plane.reduced < ceiling)
        fewer = choices.only(stays)
        if fewer is None:
            return Tightened(kept[:0], None, function, plane.point[:0], ceiling, turn + 1)
        choices, kept, matrix = fewer, kept[stays], matrix[np.ix_(stays, stays)]
        best_so_far = best_so_far[np.ix_(stays, stays)]
        best = Tightened(
            kept, choices, best.function.only(stays), best.point[stays], best.bound, turn + 1
        )
        helped = gained > _WORTHWHILE * gap or len(kept) < (1 - _WORTHWHILE) * count
        idle = 0 if helped else idle + 1
        done = best.bound >= enough or len(kept) == len(choices.sizes)
        if done or idle == 2 or time.monotonic() >= deadline:
            break
        point = plane.point[stays]
        mixed = np.maximum(point, _SPREAD) if mixed is None else (mixed[stays] + point) / 2
        before = None if turn == 0 else best_so_far
        # The relaxation needs time too.
        soon = (time.monotonic() + deadline) / 2
        blocks = best_blocks(matrix, choices, mixed, before=before, deadline=soon)
        function = convexified(matrix, blocks, choices)
    return best
