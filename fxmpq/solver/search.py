"""The search for the optimum of an instance, and its proof."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np

from fxmpq.errors import BudgetError
from fxmpq.solver.branch import Branched, Cover, branch, sharp_prices, violated_cover
from fxmpq.solver.exchange import exchanged
from fxmpq.solver.instance import Instance, Option, reduce_instance
from fxmpq.solver.lists import best_by_lists
from fxmpq.solver.relaxation import (
    Floats,
    Relaxation,
    improved,
    prices_per_cost,
    prices_per_limit,
)

# How many options beyond one a group the first core has.
_CORE = 100
# How far the objective may fall before the scale it was solved at is too coarse.
_COARSE = 1000


@dataclass(frozen=True)
class Found:
    """The best choice and what is proven about it.

    Args:
        keys: Key of the chosen option of every group.
        objective: Its sum of values.
        bound: No choice has a smaller one.
        prices: On every limit, in units of value per unit of cost, whose bound proved it.
    """

    keys: frozenset[int]
    objective: int
    bound: Fraction
    prices: tuple[Fraction, ...] = ()


@dataclass(frozen=True)
class Start:
    """What the answer to a similar program tells of this one: same options, other limits.

    Args:
        keys: A choice to begin with; if it does not keep all limits, it is of use where an
            exchange of one or two options makes it.
        prices: On every limit, of which the bound may be sharp here too; none if empty.
        floor: A bound on the objective that holds here, if one is known.
    """

    keys: frozenset[int]
    prices: tuple[Fraction, ...] = ()
    floor: int | None = None


def find_optimum(
    instance: Instance,
    *,
    solver: str,
    time_limit: float,
    max_gap: float,
    start: Start | None = None,
) -> Found | None:
    """Find the choice of least value that keeps all limits.

    A first choice comes from prices on the limits, or from `start`. The prices also bound from
    below what any choice with a given option costs, so only options whose bound lies under the
    best choice matter. Where few are left, exact lists of partial choices prove the optimum
    (`best_by_lists`). Else the integer program is first solved on a core, the options of least
    reduced cost, which gives a better choice and rules out more; then on all options that
    remain, which proves the optimum (Balas and Zemel, 1980; Pisinger, 1995).

    Solvers allow sums to exceed limits by a tolerance. Solutions are therefore checked in
    integers, and one that exceeds a limit is cut off by the cover inequality it violates.

    Args:
        instance: The program.
        solver: `cbc` or `highs`.
        time_limit: In seconds.
        max_gap: Relative gap at which to stop.
        start: From the optimum of other limits, to save time.

    Returns:
        The optimum, or the best choice found in time; `None` if no choice keeps all limits.

    Raises:
        BudgetError: If time ran out before any choice was found.
    """
    search = _Search(instance, solver, time_limit, max_gap)
    if start is None or not search.resume(start.keys):
        reduced = reduce_instance(instance)
        if reduced is None:
            return None
        search = _Search(reduced, solver, time_limit, max_gap)
        if not search.start():
            return None
    if start is not None:
        search.prices.update(enumerate(start.prices))
        if start.floor is not None:
            search.raise_bound(start.floor)
    search.improve()
    prices = tuple(search.prices.get(row, Fraction(0)) for row in range(len(instance.limits)))
    return Found(search.keys, search.objective, search.bound, prices)


class _Search:
    """The best choice so far, the bound so far, and the inequalities learnt."""

    def __init__(self, instance: Instance, solver: str, seconds: float, max_gap: float) -> None:
        self.keys: frozenset[int] = frozenset()
        self.objective = 0
        least = sum(option.value for option in _least(instance))
        self.bound = Fraction(instance.constant + least)
        self.prices: dict[int, Fraction] = {}
        self._instance = instance
        self._solver = solver
        self._seconds = seconds
        self._deadline = time.monotonic() + seconds
        self._max_gap = max_gap
        self._covers: list[Cover] = []
        self._group = {
            option.key: index for index, group in enumerate(instance.groups) for option in group
        }
        self._option = {option.key: option for option in instance.options}

    def resume(self, keys: Collection[int]) -> bool:
        """Take a choice given by its keys, or the nearest one; false if no near one fits."""
        chosen = [self._option[key] for key in sorted(keys, key=self._group.__getitem__)]
        near = exchanged(self._instance, chosen)
        if near is not None:
            self._take(near)
        return near is not None

    def start(self) -> bool:
        """Find a first choice; false if there is none."""
        if not self._instance.limits:
            self._take(_least(self._instance))
            return True
        values = [max(option.value for option in group) for group in self._instance.groups]
        relaxation = Relaxation.of(self._instance, max(sum(values), 1))
        chosen = relaxation.repaired(relaxation.single_price())
        if chosen is not None:
            options = self._instance.options
            picked = [options[index] for index in chosen]
            if self._instance.is_met_by(picked):
                self._take(picked)
                return True
        # Without an objective the solver stops at the first choice that keeps the limits.
        answer = self._branch(_without_values(self._instance), unit=1)
        if answer.chosen is not None:
            self._take(answer.chosen)
        elif not answer.complete:
            raise BudgetError(
                f"{self._solver} found no choice within all limits in {self._seconds:g} s, and did "
                "not prove that there is none; give it a longer time_limit, or raise the budget"
            )
        return answer.chosen is not None

    def improve(self) -> None:
        """Improve the choice until it is proven, close enough, or time is out."""
        if self._is_good_enough():
            return
        remaining = reduce_instance(self._instance, self.objective - 1)
        if remaining is None:
            self.bound = Fraction(self.objective)
            return
        if not remaining.limits:
            self._take(self._options(_least(remaining), remaining))
            self.bound = Fraction(self.objective)
            return
        unit = self.objective - remaining.constant
        relaxation = Relaxation.of(remaining, unit)
        known = prices_per_limit(remaining, self.prices, unit)
        if len(known) > 1 and known.any() and self._is_listed(remaining, relaxation, known, unit):
            return
        prices = self._prices(relaxation, known)
        self.prices.update(prices_per_cost(remaining, prices, unit))
        lower, reduced = relaxation.bound(prices)
        self.raise_bound(remaining.constant + Fraction(lower) * unit)
        if self._is_good_enough() or self._is_listed(remaining, relaxation, prices, unit):
            return
        extra = len(relaxation.starts) + _CORE
        reach = float(np.partition(reduced, extra)[extra]) if extra < len(reduced) else np.inf
        complete, last = True, False
        while complete and not last and not self._is_good_enough():
            slack = float(Fraction(self.objective - remaining.constant, unit)) - lower
            # Options out of reach are in no choice better than the one there is.
            last = reach >= slack
            bound, complete = self._solve_core(remaining.keeping(reduced <= min(reach, slack)))
            if not last:
                bound = min(bound, remaining.constant + Fraction(lower + reach) * unit)
            self.raise_bound(bound)
            reach = slack

    def _is_listed(
        self, remaining: Instance, relaxation: Relaxation, prices: Floats, unit: int
    ) -> bool:
        """Whether lists of partial choices, which may give a better one, prove the best."""
        if time.monotonic() >= self._deadline:
            return False
        most = self.objective - remaining.constant - 1
        listed = best_by_lists(remaining, relaxation, prices, unit=unit, most=most)
        if listed.chosen is not None:
            self._take(self._options(listed.chosen, remaining))
        if listed.complete:
            self.bound = Fraction(self.objective)
        return listed.complete

    def _solve_core(self, restricted: Instance) -> tuple[Fraction, bool]:
        """Look for a better choice in a part; returns its lower bound and whether it is proven."""
        core = reduce_instance(restricted, self.objective - 1)
        if core is None:
            return Fraction(self.objective), True
        if not core.limits:
            self._take(self._options(_least(core), core))
            return Fraction(self.objective), True
        unit = self.objective - core.constant
        answer = self._branch(core, unit=unit)
        if answer.chosen is not None and self._total(answer.chosen) < self.objective:
            self._take(answer.chosen)
        if (self.objective - core.constant) * _COARSE < unit:
            # Differences this far below the scale are lost to the solver: look again, closer.
            return self._solve_core(restricted)
        if answer.complete and (self._max_gap == 0 or answer.chosen is None):
            return Fraction(self.objective), True
        return core.constant + Fraction(answer.bound) * unit, answer.complete

    def _branch(self, instance: Instance, *, unit: int) -> Branched:
        """Solve a part by the integer program until the answer keeps all limits without rounding.

        The choice is one of the whole instance.
        """
        allowed = Fraction(self._max_gap) * abs(self.objective) / unit
        while True:
            answer = branch(
                instance,
                self._covers,
                solver=self._solver,
                seconds=self._deadline - time.monotonic(),
                unit=unit,
                allowed_gap=float(allowed),
            )
            if answer.chosen is None:
                return answer
            chosen = self._options(answer.chosen, instance)
            if self._instance.is_met_by(chosen):
                return replace(answer, chosen=tuple(chosen))
            near = exchanged(self._instance, chosen) if allowed else None
            most = instance.constant + (Fraction(answer.bound) + allowed) * unit
            if near is not None and self._total(near) <= most:
                return replace(answer, chosen=tuple(near))
            self._covers.append(violated_cover(self._instance, chosen))

    def _prices(self, relaxation: Relaxation, known: Floats) -> Floats:
        if len(known) == 1:
            return relaxation.single_price(near=float(known[0]))
        seconds = self._deadline - time.monotonic()
        return sharp_prices(relaxation, solver=self._solver, seconds=seconds)

    def _options(self, chosen: Sequence[Option], part: Instance) -> list[Option]:
        """A choice in a part of the instance as a choice in the whole, in order of the groups."""
        keys = {option.key for option in chosen}.union(part.settled).intersection(self._option)
        return [self._option[key] for key in sorted(keys, key=self._group.__getitem__)]

    def _take(self, chosen: Sequence[Option]) -> None:
        best = improved(self._instance, chosen)
        self.keys = frozenset(self._instance.settled).union(option.key for option in best)
        self.objective = self._total(best)

    def _total(self, chosen: Sequence[Option]) -> int:
        return self._instance.constant + sum(option.value for option in chosen)

    def raise_bound(self, bound: Fraction | int) -> None:
        """Take note of a lower bound."""
        self.bound = min(max(self.bound, Fraction(bound)), Fraction(self.objective))

    def _is_good_enough(self) -> bool:
        return self.objective - self.bound <= Fraction(self._max_gap) * abs(self.objective)


def _least(instance: Instance) -> list[Option]:
    return [min(group, key=lambda option: option.value) for group in instance.groups]


def _without_values(instance: Instance) -> Instance:
    groups = tuple(tuple(option._replace(value=0) for option in group) for group in instance.groups)
    return replace(instance, groups=groups)
