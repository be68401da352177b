"""The bit-width program: one option a group, any number of limits, solved to proven optimality."""

from __future__ import annotations

import itertools
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import mip
import numpy as np

from fxmpq.errors import FxmpqError, InfeasibleBudgetError, closest
from fxmpq.solver.choices import (
    Array,
    Problem,
    Relaxed,
    Row,
    Table,
    build_problem,
    drop_hopeless,
    relax,
)

SOLVERS: Mapping[str, str] = {"cbc": mip.CBC, "highs": mip.HIGHS}
"""By name, since python-mip would otherwise prefer a commercial solver it finds."""

_OBJECTIVE_SCALE = 1e6  # CBC looks for improvements above 1e-5 only: 1e-11 of the optimum
_COARSE = 1e-3
_ATTEMPTS = 20
_TIGHTENING = 1e-6
_IMPOSSIBLE = (mip.OptimizationStatus.INFEASIBLE, mip.OptimizationStatus.INT_INFEASIBLE)
_FOUND = (mip.OptimizationStatus.OPTIMAL, mip.OptimizationStatus.FEASIBLE)


@dataclass(frozen=True)
class Cover:
    """Options, as indices per unit, of which no more than `most` fit together."""

    options: list[list[int]]
    most: int


@dataclass(frozen=True)
class Solution:
    """The answer of the program.

    Args:
        choices: Precision name per group.
        objective: Sum of the chosen values.
        bound: Proven lower bound on the objective.
        status: `optimal`, or `feasible` when the optimum was not proven in the time given.
        seconds: Wall time.
    """

    choices: dict[str, str]
    objective: float
    bound: float
    status: str
    seconds: float

    @property
    def gap(self) -> float:
        """`(objective - bound) / |objective|`, 0 when they agree, 1 for an objective of 0."""
        difference = self.objective - self.bound
        if difference <= 0:
            return 0.0
        return min(difference / (abs(self.objective) or difference), sys.float_info.max)


def solve_program(
    objective: Table,
    rows: Sequence[Row],
    *,
    ties: Sequence[Sequence[str]] = (),
    solver: str = "cbc",
    time_limit: float = 60.0,
    max_gap: float = 0.0,
) -> Solution:
    """Minimise `sum_g objective[g][c_g]` over one option `c_g` a group, within all rows.

    The multiple-choice knapsack with any number of limits. Before the solver sees it, every
    group is shifted to least value 0, options that are dominated or that a Lagrangian bound
    excludes are dropped, and objective and limits are scaled to the order of the optimum:
    raw sensitivities of 1e-9 lie below a solver's tolerances. Every answer is checked against
    the limits in exact arithmetic; one that a solver's tolerance let through is cut off by a
    cover inequality (some group must use less of that limit), and the search goes on. All of it
    shares one time limit.

    Args:
        objective: Group to precision to value; values may be negative.
        rows: Limits over the same groups and precisions.
        ties: Groups that must take the same precision.
        solver: `cbc` or `highs`.
        time_limit: Seconds for everything, after which the best choice found is returned.
        max_gap: Relative gap at which the solver may stop.

    Returns:
        The choices, with a proven bound.

    Raises:
        InfeasibleBudgetError: If no choice is within all rows.
        FxmpqError: If the solver's name or a tie is unknown, the tables do not cover the same
            entries, or the time was too short to find any choice.

    Example:
        >>> objective = {"a": {"w4a8": 1.0, "w8a8": 0.0}, "b": {"w4a8": 3.0, "w8a8": 0.0}}
        >>> size = {"a": {"w4a8": 4, "w8a8": 8}, "b": {"w4a8": 4, "w8a8": 8}}
        >>> solve_program(objective, [Row(size, 12)]).choices
        {'a': 'w4a8', 'b': 'w8a8'}
    """
    if solver not in SOLVERS:
        raise FxmpqError(f"no solver {solver!r}; there are {closest(solver, SOLVERS)}")
    start = time.perf_counter()
    problem = build_problem(objective, rows, ties)
    if (problem.rooms < 0).any():
        raise InfeasibleBudgetError("a limit lies below the smallest value reachable")
    problem = drop_hopeless(problem)
    if not all(unit.names for unit in problem.units):
        raise InfeasibleBudgetError("a group has no precision within all limits")
    relaxed = relax(problem)
    search = _Search(relaxed)
    status = search.run(solver, start + time_limit, max_gap)
    if search.picks is None:
        raise FxmpqError(
            f"{solver} found no choice within all limits in {time_limit:g} s, and did not prove "
            "that there is none; give it a longer time_limit, or raise the budget"
        )
    choices = {
        group: unit.names[pick]
        for unit, pick in zip(relaxed.problem.units, search.picks, strict=True)
        for group in unit.groups
    }
    choices = {group: choices[group] for group in objective}
    total = math.fsum(objective[group][name] for group, name in choices.items())
    # Adding the offset back rounds: a choice that reaches the bound is the bound.
    proven = search.value <= search.bound
    bound = total if proven else min(total, problem.offset + search.bound)
    status = "optimal" if proven else status
    return Solution(choices, total, bound, status, time.perf_counter() - start)


class _Search:
    """Looks for the best choice; holds the best one known and a proven lower bound."""

    def __init__(self, relaxed: Relaxed) -> None:
        self._problem = relaxed.problem
        self._covers: list[Cover] = []
        self.picks = relaxed.picks
        self.value = relaxed.value
        self.bound = relaxed.bound

    def run(self, solver: str, deadline: float, max_gap: float) -> str:
        """Improve the choice until it is proven or time is up; returns the status."""
        if self._settled():
            return "optimal"
        scale = (self.value if self.picks is not None else _largest(self._problem)) or 1.0
        for attempt in range(_ATTEMPTS):
            seconds = deadline - time.perf_counter()
            if seconds <= 0:
                break
            last = attempt == _ATTEMPTS - 1
            program = _Program(self._problem, solver, scale, _TIGHTENING if last else 0.0)
            program.restrict(self.picks, self.value, self._covers)
            status = program.optimize(seconds, max_gap)
            if status in _IMPOSSIBLE and self.picks is None and not last:
                raise InfeasibleBudgetError("no choice is within all limits")
            if status not in _FOUND:
                break
            if not last:
                self.bound = max(self.bound, program.bound())
            if not self._take(program.picks()) or last:
                continue
            if 0 < self.value < scale * _COARSE:
                scale = self.value
            elif status == mip.OptimizationStatus.OPTIMAL:
                self.bound = self.value if max_gap == 0.0 else self.bound
                return "optimal"
        return "feasible"

    def _settled(self) -> bool:
        """Whether the relaxation has said it all."""
        if all(len(unit.names) == 1 for unit in self._problem.units):
            if self.picks is None:
                raise InfeasibleBudgetError("no choice is within all limits")
            self.bound = self.value
        return self.picks is not None and self.value <= self.bound

    def _take(self, picks: tuple[int, ...]) -> bool:
        """Keep a choice if it is the best within all limits; learn from one that is not."""
        units = self._problem.units
        for index, room in enumerate(self._problem.rooms):
            used = [unit.usage[index, pick] for unit, pick in zip(units, picks, strict=True)]
            if math.fsum(used) > room:
                self._covers.append(_cover([unit.usage[index] for unit in units], used, room))
                return False
        value = math.fsum(unit.values[pick] for unit, pick in zip(units, picks, strict=True))
        if value < self.value:
            self.picks, self.value = picks, value
        return True


def _largest(problem: Problem) -> float:
    return max(float(unit.values.max()) for unit in problem.units)


def _cover(usages: Sequence[Array], used: Sequence[float], room: float) -> Cover:
    """The extended cover that a choice over a limit shows.

    The largest takings that exceed the room are a cover, and so are as many options, one a unit,
    that each take no less than the one they replace, or elsewhere than the cover's largest.
    """
    order = sorted(range(len(used)), key=lambda place: used[place], reverse=True)
    sums = itertools.accumulate(used[place] for place in order)
    size = next((count for count, taken in enumerate(sums, 1) if taken > room), len(order))
    least = [used[order[0]]] * len(used)
    for place in order[:size]:
        least[place] = used[place]
    pairs = zip(usages, least, strict=True)
    return Cover([np.flatnonzero(usage >= taken).tolist() for usage, taken in pairs], size - 1)


class _Program:
    """One binary program in python-mip, in scaled units."""

    def __init__(self, problem: Problem, solver: str, scale: float, tightening: float) -> None:
        self._problem = problem
        self._scale = scale
        self._model = mip.Model(sense=mip.MINIMIZE, solver_name=SOLVERS[solver])
        self._model.verbose = 0
        self._columns = [
            [self._model.add_var(var_type=mip.BINARY) for _ in unit.names]
            for unit in self._problem.units
        ]
        factor = _OBJECTIVE_SCALE / scale
        self._model.objective = mip.xsum(
            float(value) * factor * column
            for unit, columns in zip(self._problem.units, self._columns, strict=True)
            for value, column in zip(unit.values, columns, strict=True)
            if value
        )
        for columns in self._columns:
            self._model.add_constr(mip.xsum(columns) == 1)
        for index, room in enumerate(self._problem.rooms):
            if room > 0:
                self._add_limit(index, float(room), 1.0 - tightening)

    def _add_limit(self, index: int, room: float, right_side: float) -> None:
        self._model.add_constr(
            mip.xsum(
                float(unit.usage[index, option]) / room * column
                for unit, columns in zip(self._problem.units, self._columns, strict=True)
                for option, column in enumerate(columns)
                if unit.usage[index, option]
            )
            <= right_side
        )

    def restrict(self, picks: Sequence[int] | None, value: float, covers: Sequence[Cover]) -> None:
        """Start from the best choice known, without what cannot beat it or does not fit."""
        for unit, columns in zip(self._problem.units, self._columns, strict=True):
            for column, alone in zip(columns, unit.values, strict=True):
                if alone > value:
                    column.ub = 0.0
        for cover in covers:
            self._model.add_constr(
                mip.xsum(
                    columns[option]
                    for columns, options in zip(self._columns, cover.options, strict=True)
                    for option in options
                )
                <= cover.most
            )
        if picks is not None:
            self._model.start = [
                (columns[pick], 1.0) for columns, pick in zip(self._columns, picks, strict=True)
            ]

    def optimize(self, time_limit: float, max_gap: float) -> mip.OptimizationStatus:
        """Run the solver and return its status."""
        self._model.max_mip_gap = max_gap
        self._model.max_mip_gap_abs = _OBJECTIVE_SCALE * 1e-12
        return self._model.optimize(max_seconds=time_limit)

    def bound(self) -> float:
        """Proven lower bound on the sum of values; minus infinity if there is none."""
        found = self._model.objective_bound
        return -math.inf if found is None else float(found) * self._scale / _OBJECTIVE_SCALE

    def picks(self) -> tuple[int, ...]:
        """The chosen option per unit."""
        return tuple(
            max(range(len(columns)), key=lambda option: float(columns[option].x or 0.0))
            for columns in self._columns
        )
