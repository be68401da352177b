"""Moving curvature into linear terms: the convex form with the best relaxation.

A choice takes one option a group, so within a group `x_i x_j` is 0 and `x_i^2` is `x_i`. Any block
diagonal matrix B, one block a group, may therefore be moved into linear terms,

    x^T M x = x^T (M - B) x + diag(B)^T x    for every choice x,

while mixtures of options become dearer the larger B is. `M - B` need only be positive
semi-definite on differences of choices, whose entries sum to 0 in each group. The best B solves a
semi-definite program (Billionnet, Elloumi, Plateau, 2009: quadratic convex reformulation).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from fxmpq.solver.quadratic.planes import Choices, Quadratic
from fxmpq.solver.relaxation import Floats

# Weights of the barrier from a cold start and from a B that is good already.
_COLD = (1e-2, 1e-3, 1e-4, 3e-5)
_WARM = (1e-3, 1e-4)
# Weight of curvature where the relaxation mixes nothing yet.
_COLD_FLOOR = 0.03
_WARM_FLOOR = 0.01
_NEWTON_STEPS = 25
_HALVINGS = 20
_CENTRED = 2.0
_JITTER = 1e-6
_NOTHING = 1e-14
# With more unknowns than this, only the diagonal of scaled blocks is sought.
_MOST_UNKNOWNS = 1200
_FARTHEST = 1e3


def convexified(matrix: Floats, blocks: Floats, choices: Choices) -> Quadratic:
    """Write `x^T M x` with a block-diagonal part moved into linear terms.

    Args:
        matrix: `M`, `[options, options]`.
        blocks: `B`; `M - B` positive semi-definite on differences of choices.
        choices: The options.

    Returns:
        A function equal to `x^T M x` at every choice, convex everywhere.
    """
    basis = difference_basis(choices.sizes)
    even = choices.even
    rest = matrix - blocks
    centred = basis @ (basis.T @ rest @ basis) @ basis.T
    centred = (centred + centred.T) / 2
    pulled = rest @ even
    linear = blocks.diagonal() + 2 * (basis @ (basis.T @ pulled))
    lowest = float(np.linalg.eigvalsh(centred)[0])
    # Two points of the relaxation differ by at most 2 a group in squared length.
    slack = max(-lowest, 0.0) * 2 * len(choices.sizes)
    return Quadratic(centred, linear, float(even @ pulled), slack)


def best_blocks(
    matrix: Floats,
    choices: Choices,
    point: Floats,
    *,
    before: Floats | None = None,
    deadline: float = np.inf,
) -> Floats:
    """Find the block diagonal that lifts the function most at a point of the relaxation.

    Moving B lifts the function at `x` by `sum_g <B_g, diag(x_g) - x_g x_g^T>`. This is maximised
    over `M - B` positive semi-definite on differences of choices, by Newton's method on a
    logarithmic barrier. Every step on the way is a valid B.

    Args:
        matrix: `M`, `[options, options]`, positive semi-definite.
        choices: The options.
        point: Shares of the options.
        before: A valid B to begin from.
        deadline: Reading of `time.monotonic` after which the B so far is returned.

    Returns:
        `[options, options]`.
    """
    basis = difference_basis(choices.sizes)
    on_basis = basis.T @ matrix @ basis
    average = float(np.trace(on_basis)) / max(len(on_basis), 1)
    if average <= _NOTHING * float(np.trace(matrix)):
        return np.zeros_like(matrix)
    owner = np.repeat(np.arange(len(choices.sizes)), np.array(choices.sizes) - 1)
    inside = owner[:, None] == owner
    sizes = np.bincount(owner, weights=on_basis.diagonal(), minlength=len(choices.sizes))
    own = np.where(inside, on_basis, 0) + np.diag(_JITTER * sizes[owner] + 1e-9 * average)
    factor = np.linalg.cholesky(own)
    inverse = np.linalg.inv(factor)
    scaled = inverse @ on_basis @ inverse.T
    weight = factor.T @ (basis.T @ _spread(choices, point) @ basis) @ factor
    weight = np.where(inside, weight, 0) / max(float(np.trace(weight)), 1e-12)
    floor = _COLD_FLOOR if before is None else _WARM_FLOOR
    weight += floor * np.eye(len(weight)) / len(weight)
    unknown = np.triu(inside)
    if unknown.sum() > _MOST_UNKNOWNS:
        unknown = np.eye(len(weight), dtype=bool)
    start = -0.1 * np.eye(len(weight))
    if before is not None:
        moved = inverse @ (basis.T @ before @ basis) @ inverse.T
        start = np.where(unknown | unknown.T, moved, 0) - 1e-3 * np.eye(len(weight))
        if float(np.linalg.eigvalsh(scaled - start)[0]) <= 0:
            return best_blocks(matrix, choices, point, deadline=deadline)
    barrier = _Barrier((scaled + scaled.T) / 2, weight, (start + start.T) / 2, unknown)
    for price in _COLD if before is None else _WARM:
        barrier.centre(price, deadline)
    blocks: Floats = basis @ (factor @ barrier.blocks @ factor.T) @ basis.T
    return blocks


class _Barrier:
    """Maximises `<weight, B> + price log det(matrix - B)` over B with given unknown entries."""

    def __init__(
        self, matrix: Floats, weight: Floats, blocks: Floats, unknown: NDArray[np.bool_]
    ) -> None:
        self.blocks = blocks
        self._rest = matrix - blocks
        self._row, self._column = np.nonzero(unknown)
        # An entry off the diagonal counts twice.
        self._twice = np.where(self._row == self._column, 1.0, 2.0)
        self._gain = self._twice * weight[self._row, self._column]

    def centre(self, price: float, deadline: float) -> None:
        """Take Newton steps until close to the maximum."""
        for _ in range(_NEWTON_STEPS):
            if time.monotonic() >= deadline:
                return
            try:
                decrement = self._step(price)
            except np.linalg.LinAlgError:
                return
            if not decrement >= _CENTRED:
                return

    def _step(self, price: float) -> float:
        row, column = self._row, self._column
        inverse = np.linalg.inv(self._rest)
        slope = self._gain - price * self._twice * inverse[row, column]
        curvature = inverse[np.ix_(row, row)] * inverse[np.ix_(column, column)]
        curvature += inverse[np.ix_(row, column)] * inverse[np.ix_(column, row)]
        curvature *= price / 2 * self._twice[:, None] * self._twice
        change = np.linalg.solve(curvature, slope)
        direction = np.zeros_like(self._rest)
        direction[row, column] = direction[column, row] = change
        root = np.linalg.inv(np.linalg.cholesky(self._rest))
        rates = np.linalg.eigvalsh(root @ direction @ root.T)
        length = _longest(float(self._gain @ change), price, rates)
        rest = self._rest - length * direction
        np.linalg.cholesky(rest)
        self._rest, self.blocks = rest, self.blocks + length * direction
        return float(slope @ change) / price


def _longest(gain: float, price: float, rates: Floats) -> float:
    """The step t that maximises `gain t + price sum log(1 - t rates)`, by bisection."""
    low, high = 0.0, 0.99 / float(rates[-1]) if rates[-1] > 0.99 / _FARTHEST else _FARTHEST
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        rises = gain > price * float((rates / (1 - middle * rates)).sum())
        low, high = (middle, high) if rises else (low, middle)
    return low


def _spread(choices: Choices, point: Floats) -> Floats:
    """`diag(x_g) - x_g x_g^T` in every block."""
    positive = np.maximum(point, 0)
    shares = positive / np.add.reduceat(positive, choices.starts)[choices.group]
    same = choices.group[:, None] == choices.group
    return np.asarray(np.diag(shares) - np.where(same, np.outer(shares, shares), 0))


def difference_basis(sizes: Sequence[int]) -> Floats:
    """An orthonormal basis of differences of choices, `[options, options - groups]`.

    Examples:
        >>> difference_basis([2, 1]).round(3).tolist()
        [[-0.707], [0.707], [0.0]]
    """
    options = sum(sizes)
    basis = np.zeros((options, options - len(sizes)))
    row = column = 0
    for size in sizes:
        basis[row : row + size, column : column + size - 1] = _against_ones(size)
        row, column = row + size, column + size - 1
    return basis


@lru_cache(maxsize=64)
def _against_ones(size: int) -> Floats:
    columns = np.hstack([np.ones((size, 1)), np.eye(size)[:, : size - 1]])
    basis = np.linalg.qr(columns)[0][:, 1:]
    # Signs are the library's: the last entry of every vector is made positive.
    return np.asarray(basis * np.where(basis[-1] < 0, -1, 1))
