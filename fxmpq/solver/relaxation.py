"""Lower bounds and good choices from prices on the limits (Lagrangian relaxation).

With a price `u_k >= 0` on each limit, scaled so that every limit is 1, any choice costs at least

    L(u) = sum_g min_j (v_gj + sum_k u_k c_kgj) - sum_k u_k,

and a choice that contains option j of group g at least `L(u)` plus that option's reduced cost,
the amount by which it misses its group's minimum (Kellerer, Pferschy, Pisinger: Knapsack
Problems, 2004, chapter 11). Any prices give valid bounds; good prices give sharp ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from fxmpq.solver.instance import Instance, Option

Floats = NDArray[np.float64]
Indices = NDArray[np.intp]

_BISECTIONS = 60
_STEEPEST = 1e30
_ROUNDING = 1e-12
_NEAR = 1e-9


@dataclass(frozen=True)
class Relaxation:
    """An instance in floating point, options flattened group by group.

    Args:
        group: Group of each option, `[options]`.
        starts: First option of each group, `[groups]`.
        values: Objective of each option in units of `unit`, `[options]`.
        costs: Cost of each option as a share of the limit, `[limits, options]`.
    """

    group: Indices
    starts: Indices
    values: Floats
    costs: Floats

    @classmethod
    def of(cls, instance: Instance, unit: int) -> Relaxation:
        """Scale an instance: limits become 1, values are counted in units of `unit`."""
        sizes = [len(group) for group in instance.groups]
        options = instance.options
        costs = [
            [option.costs[row] / limit for option in options]
            for row, limit in enumerate(instance.limits)
        ]
        return cls(
            group=np.repeat(np.arange(len(sizes)), sizes),
            starts=np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.intp),
            values=np.array([option.value / unit for option in options]),
            costs=np.array(costs).reshape(len(instance.limits), len(options)),
        )

    def cheapest(self, prices: Floats) -> Indices:
        """The option of least value plus priced cost in each group, `[groups]`."""
        priced = self.values + prices @ self.costs
        return np.lexsort((priced, self.group))[self.starts]

    def bound(self, prices: Floats) -> tuple[float, Floats]:
        """The lower bound `L(u)`, a little less for rounding, and every reduced cost."""
        priced = self.values + prices @ self.costs
        least = np.minimum.reduceat(priced, self.starts)
        gained, paid = float(least.sum()), float(prices.sum())
        rounding = _ROUNDING * (1 + gained + paid)
        return gained - paid - rounding, priced - least[self.group]

    def single_price(self, near: float = 0.0) -> Floats:
        """The least price, the same for all limits, at which the cheapest options fit.

        With one limit these are the prices of the sharpest bound.

        Args:
            near: A price that may be it already, within `_NEAR` of it.
        """
        ones = np.ones(len(self.costs))
        low, high = near * (1 - _NEAR), near * (1 + _NEAR)
        if self._fits(self.cheapest(high * ones)) and not self._fits(self.cheapest(low * ones)):
            return high * ones
        low, high = 0.0, 1e-6
        while high < _STEEPEST and not self._fits(self.cheapest(high * ones)):
            low, high = high, 16 * high
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            low, high = (
                (low, middle) if self._fits(self.cheapest(middle * ones)) else (middle, high)
            )
        return high * ones

    def repaired(self, prices: Floats) -> Indices | None:
        """The cheapest options, changed one by one until they fit.

        Each change is the one that removes the most excess for the reduced cost it adds.

        Returns:
            The option of each group, or `None` if no single change helps any more.
        """
        _, reduced = self.bound(prices)
        chosen = self.cheapest(prices)
        used = self.costs[:, chosen].sum(axis=1)
        while not self._fits(chosen):
            after = used[:, None] + self.costs - self.costs[:, chosen[self.group]]
            removed = np.maximum(used - 1, 0).sum() - np.maximum(after - 1, 0).sum(axis=0)
            added = reduced - reduced[chosen[self.group]]
            price = np.full(len(removed), np.inf)
            np.divide(added, removed, out=price, where=removed > _ROUNDING)
            best = int(price.argmin())
            if not np.isfinite(price[best]):
                return None
            chosen[self.group[best]] = best
            used = self.costs[:, chosen].sum(axis=1)
        return chosen

    def _fits(self, chosen: Indices) -> bool:
        return bool((self.costs[:, chosen].sum(axis=1) <= 1).all())


def prices_per_cost(instance: Instance, prices: Floats, unit: int) -> dict[int, Fraction]:
    """Express prices as value per cost of the program before its reduction.

    Args:
        instance: What the prices are for.
        prices: A price per limit, for the whole of it, in units of `unit`.
        unit: In values.

    Returns:
        Price by row of the original program.
    """
    return {
        row: Fraction(float(price)) * unit / (limit * divisor)
        for price, limit, (row, divisor) in zip(prices, instance.limits, instance.rows, strict=True)
    }


def prices_per_limit(instance: Instance, prices: Mapping[int, Fraction], unit: int) -> Floats:
    """The inverse of `prices_per_cost`, 0 where a row has no price.

    Args:
        instance: What the prices shall be for.
        prices: Price by row of the original program.
        unit: In values.

    Returns:
        A price per limit.
    """
    wanted = [
        prices.get(row, Fraction(0)) * limit * divisor / unit
        for limit, (row, divisor) in zip(instance.limits, instance.rows, strict=True)
    ]
    return np.array([float(min(price, Fraction(_STEEPEST))) for price in wanted])


def improved(instance: Instance, chosen: Sequence[Option]) -> list[Option]:
    """Exchange single options for better ones, the greatest gain first, while they fit.

    Args:
        instance: The program.
        chosen: One option a group; keeps every limit.

    Returns:
        A choice that no single exchange improves.
    """
    current = list(chosen)
    used = list(instance.usage(current))
    changed = True
    while changed:
        changed = False
        gains = sorted(
            (option.value - current[index].value, index, option)
            for index, group in enumerate(instance.groups)
            for option in group
            if option.value < current[index].value
        )
        for _, index, option in gains:
            before = current[index]
            after = [
                use + new - old
                for use, new, old in zip(used, option.costs, before.costs, strict=True)
            ]
            if option.value < before.value and all(
                use <= limit for use, limit in zip(after, instance.limits, strict=True)
            ):
                current[index], used, changed = option, after, True
    return current
