"""The bit-width program: one option a group, any number of limits, solved to proven optimality."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import mip

from fxmpq.errors import FxmpqError, InfeasibleBudgetError, closest
from fxmpq.solver.choices import (
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

_OBJECTIVE_SCALE = 1000.0
_ATTEMPTS = 4
_TIGHTENING = 1e-6


@dataclass(frozen=True)
class Solution:
    """The answer of the program.

    Args:
        choices: Precision name per group.
        objective: Sum of the chosen values.
        bound: Proven lower bound on the objective.
        status: `optimal`, or `feasible` when the time limit came first.
        seconds: Wall time.
    """

    choices: dict[str, str]
    objective: float
    bound: float
    status: str
    seconds: float

    @property
    def gap(self) -> float:
        """`(objective - bound) / |objective|`, 0 when they agree."""
        difference = self.objective - self.bound
        return 0.0 if difference <= 0 else difference / max(abs(self.objective), 1e-300)


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
    the limits in exact arithmetic.

    Args:
        objective: Group to precision to value; values may be negative.
        rows: Limits over the same groups and precisions.
        ties: Groups that must take the same precision.
        solver: `cbc` or `highs`.
        time_limit: Seconds, after which the best choice found is returned.
        max_gap: Relative gap at which the solver may stop.

    Returns:
        The choices, with a proven bound.

    Raises:
        InfeasibleBudgetError: If no choice is within all rows.
        FxmpqError: If the solver's name or a tie is unknown.

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
    picks, bound, status = _solve(relaxed, solver, time_limit, max_gap)
    choices = {
        group: unit.names[pick]
        for unit, pick in zip(relaxed.problem.units, picks, strict=True)
        for group in unit.groups
    }
    choices = {group: choices[group] for group in objective}
    total = math.fsum(objective[group][name] for group, name in choices.items())
    # The bound cannot exceed the objective but by rounding.
    return Solution(
        choices, total, min(total, problem.offset + bound), status, time.perf_counter() - start
    )


def _solve(
    relaxed: Relaxed, solver: str, time_limit: float, max_gap: float
) -> tuple[tuple[int, ...], float, str]:
    """Choose an option a unit; returns the picks, a lower bound and the status."""
    if relaxed.picks is not None and relaxed.value <= relaxed.bound:
        return relaxed.picks, relaxed.value, "optimal"
    if all(len(unit.names) == 1 for unit in relaxed.problem.units):
        if relaxed.picks is None:
            raise InfeasibleBudgetError("no choice is within all limits")
        return relaxed.picks, relaxed.value, "optimal"
    scale = relaxed.value if math.isfinite(relaxed.value) else _largest(relaxed.problem)
    scale = scale or 1.0
    bound = relaxed.bound
    for attempt in range(_ATTEMPTS):
        program = _Program(relaxed, solver, scale, attempt * _TIGHTENING)
        status = program.optimize(time_limit, max_gap)
        if status in (mip.OptimizationStatus.INFEASIBLE, mip.OptimizationStatus.INT_INFEASIBLE):
            break
        if attempt == 0:
            bound = max(bound, program.bound())
        if status not in (mip.OptimizationStatus.OPTIMAL, mip.OptimizationStatus.FEASIBLE):
            break
        picks = program.picks()
        if program.fits(picks):
            value = program.value(picks)
            if relaxed.picks is not None and relaxed.value < value:
                picks, value = relaxed.picks, relaxed.value
            optimal = status == mip.OptimizationStatus.OPTIMAL
            if optimal and attempt == 0 and max_gap == 0.0:
                bound = value
            return picks, bound, "optimal" if optimal else "feasible"
    if relaxed.picks is None:
        raise InfeasibleBudgetError("no choice is within all limits")
    return relaxed.picks, bound, "feasible"


def _largest(problem: Problem) -> float:
    return max(float(unit.values.max()) for unit in problem.units)


class _Program:
    """One binary program in python-mip, in scaled units."""

    def __init__(self, relaxed: Relaxed, solver: str, scale: float, tightening: float) -> None:
        self._problem = relaxed.problem
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
        if relaxed.picks is not None:
            self._model.start = [
                (columns[pick], 1.0)
                for columns, pick in zip(self._columns, relaxed.picks, strict=True)
            ]

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

    def optimize(self, time_limit: float, max_gap: float) -> mip.OptimizationStatus:
        """Run the solver and return its status."""
        self._model.max_mip_gap = max_gap
        self._model.max_mip_gap_abs = 1e-9
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

    def value(self, picks: Sequence[int]) -> float:
        """Sum of the chosen values."""
        pairs = zip(self._problem.units, picks, strict=True)
        return math.fsum(float(unit.values[pick]) for unit, pick in pairs)

    def fits(self, picks: Sequence[int]) -> bool:
        """Whether the choice is within every limit, in exact arithmetic."""
        for index, room in enumerate(self._problem.rooms):
            pairs = zip(self._problem.units, picks, strict=True)
            if math.fsum(float(unit.usage[index, pick]) for unit, pick in pairs) > room:
                return False
        return True
