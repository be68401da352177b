"""Convex quadratic programs over one-hot choices, and the planes that bound them from below.

The relaxation lets every group mix its options: `x >= 0`, the shares of a group sum to 1, and no
sum of costs exceeds its limit. A convex function lies above each of its tangent planes, and the
least value of a plane over the one-hot choices, with a price `u >= 0` on every limit, is a sum of
minima, one a group. So any point and any prices prove a bound; those that solve the relaxation
prove the best one (Duran and Grossmann, 1986).
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fxmpq.solver.relaxation import Floats, Indices

Mask = NDArray[np.bool_]

_ROUNDS = 40
_CONVERGED = 1e-7
_ROUNDING = 1e-12
# A step goes this far towards the boundary.
_NEARLY = 0.99


@dataclass(frozen=True)
class Choices:
    """Which options there are: groups and what each option takes of each limit.

    Args:
        sizes: Number of options a group, at least 1 each.
        costs: Share of each limit, `[limits, options]`, options group by group.
    """

    sizes: tuple[int, ...]
    costs: Floats

    @property
    def starts(self) -> NDArray[np.intp]:
        """First option of each group."""
        return np.concatenate([[0], np.cumsum(self.sizes)[:-1]]).astype(np.intp)

    @property
    def group(self) -> NDArray[np.intp]:
        """Group of each option."""
        return np.repeat(np.arange(len(self.sizes)), self.sizes)

    @property
    def even(self) -> Floats:
        """The point that mixes the options of each group evenly."""
        return np.repeat(1 / np.array(self.sizes), self.sizes)

    def only(self, kept: Mask | Indices) -> Choices | None:
        """The choices among some options; `None` if a group has none left."""
        left = np.bincount(self.group[kept], minlength=len(self.sizes))
        if not left.all():
            return None
        return Choices(tuple(left.tolist()), self.costs[:, kept])

    def room(self) -> Mask:
        """Options that fit within all limits when the other groups take their least."""
        floor = np.minimum.reduceat(self.costs, self.starts, axis=1)
        least = self.costs + (floor.sum(axis=1, keepdims=True) - floor[:, self.group])
        return np.asarray((least <= 1 + _ROUNDING).all(axis=0))


@dataclass(frozen=True)
class Quadratic:
    """`x^T matrix x + linear^T x + constant`, convex.

    Args:
        matrix: Positive semi-definite but for rounding, `[options, options]`.
        linear: `[options]`.
        constant: Added.
        slack: How much rounding may make a bound too great.
    """

    matrix: Floats
    linear: Floats
    constant: float
    slack: float = 0.0

    def only(self, kept: Mask | Indices) -> Quadratic:
        """The function where all other options have no share."""
        part = self.matrix[np.ix_(kept, kept)]
        return Quadratic(part, self.linear[kept], self.constant, self.slack)


@dataclass(frozen=True)
class Plane:
    """What a tangent plane proves.

    Args:
        bound: No choice has a smaller value.
        reduced: A choice with an option has at least `bound` plus the option's entry.
        point: Where it touches.
    """

    bound: float
    reduced: Floats
    point: Floats


def tangent(function: Quadratic, choices: Choices, point: Floats, prices: Floats) -> Plane:
    """The plane that touches the function at a point, and its bound at given prices.

    Args:
        function: Convex.
        choices: Options of the function.
        point: Any, `[options]`.
        prices: One a limit, not negative.

    Returns:
        The plane, its bound less a margin for rounding.
    """
    pulled = function.matrix @ point
    curved = float(point @ pulled)
    priced = 2 * pulled + function.linear + prices @ choices.costs
    least = np.minimum.reduceat(priced, choices.starts)
    paid = float(prices.sum())
    rounding = _ROUNDING * (1 + abs(curved) + float(np.abs(least).sum()) + paid)
    bound = function.constant - curved + float(least.sum()) - paid - rounding - function.slack
    return Plane(bound, priced - least[choices.group], point)


def best_plane(
    function: Quadratic, choices: Choices, enough: float = np.inf, *, deadline: float = np.inf
) -> Plane:
    """Solve the relaxation; its optimum's tangent plane is the one of the greatest bound.

    A primal-dual interior-point method with Mehrotra's predictor and corrector. It may stop
    anywhere: the planes on its way are valid too.

    Args:
        function: Convex.
        choices: Options of the function.
        enough: Bound at which to stop.
        deadline: Reading of `time.monotonic` at which to stop.

    Returns:
        The best plane on the way.
    """
    no_prices = np.zeros(len(choices.costs))
    best = tangent(function, choices, choices.even, no_prices)
    steps = _Steps(function, choices)
    for _ in range(_ROUNDS):
        late = time.monotonic() >= deadline
        if late or best.bound >= enough or not steps.advance():
            break
        plane = tangent(function, choices, steps.point, steps.prices)
        if np.isfinite(plane.bound) and plane.bound > best.bound:
            best = plane
    return best


class _Steps:
    """The interior-point method: shares and slacks `x`, their dual `z`, duals `y` of rows."""

    def __init__(self, function: Quadratic, choices: Choices) -> None:
        self._options = len(function.linear)
        self._groups, limits = len(choices.sizes), len(choices.costs)
        size = self._options + limits
        self._hessian = np.zeros((size, size))
        self._hessian[: self._options, : self._options] = 2 * function.matrix
        self._linear = np.concatenate([function.linear, np.zeros(limits)])
        self._rows = np.zeros((self._groups + limits, size))
        self._rows[choices.group, np.arange(self._options)] = 1
        self._rows[self._groups :, : self._options] = choices.costs
        self._rows[self._groups :, self._options :] = np.eye(limits)
        self._scale = max(
            float(np.abs(self._hessian).max(initial=0)),
            float(np.abs(self._linear).max(initial=0)),
            1e-9,
        )
        self._x = np.concatenate([choices.even, np.ones(limits)])
        self._z = np.full(size, self._scale)
        self._y = np.zeros(self._groups + limits)

    @property
    def point(self) -> Floats:
        """Shares of the options."""
        return self._x[: self._options]

    @property
    def prices(self) -> Floats:
        """Prices of the limits."""
        return np.maximum(-self._y[self._groups :], 0)

    def advance(self) -> bool:
        """Take a step; false if it has converged or rounding allows no more."""
        x, z = self._x, self._z
        missing = 1 - self._rows @ x
        slope = self._hessian @ x + self._linear - self._rows.T @ self._y - z
        product = float(x @ z)
        far = max(float(np.abs(missing).max()), float(np.abs(slope).max()) / self._scale)
        if not np.isfinite(product) or (far < _CONVERGED and product < _CONVERGED):
            return False
        try:
            inverse = np.linalg.inv(self._hessian + np.diag(z / x))
            carried = inverse @ self._rows.T
            normal = np.linalg.inv(self._rows @ carried)
        except np.linalg.LinAlgError:
            return False

        def direction(target: Floats) -> tuple[Floats, Floats, Floats]:
            free = inverse @ (target / x - slope)
            dual = normal @ (missing - self._rows @ free)
            moved = free + carried @ dual
            return moved, dual, (target - z * moved) / x

        moved, _, changed = direction(-x * z)
        ahead = x + min(1.0, _reach(x, moved)) * moved
        after = z + min(1.0, _reach(z, changed)) * changed
        centring = (float(ahead @ after) / product) ** 3
        aim = centring * product / len(x) - x * z - moved * changed
        moved, dual, changed = direction(aim)
        length = min(1.0, _NEARLY * _reach(x, moved), _NEARLY * _reach(z, changed))
        self._x = x + length * moved
        self._y = self._y + length * dual
        self._z = z + length * changed
        return bool(np.isfinite(self._x).all() and np.isfinite(self._z).all())


def _reach(values: Floats, change: Floats) -> float:
    """How far positive values can follow a change, in units of it."""
    falling = change < 0
    return min(2.0, float((-values[falling] / change[falling]).min(initial=2.0)))
