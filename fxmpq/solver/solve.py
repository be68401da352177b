"""Solve: from sensitivities, costs and a budget to a plan."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fxmpq.costs.table import CostTable
from fxmpq.errors import BudgetError, InfeasibleBudgetError
from fxmpq.sensitivity.sensitivity import Sensitivity
from fxmpq.solver.budget import Budget, infeasible_message
from fxmpq.solver.edges import solve_rows
from fxmpq.solver.limits import limit_rows
from fxmpq.solver.peaks import minimize_peak
from fxmpq.solver.plan import Plan
from fxmpq.solver.planning import check_tables, plan_of
from fxmpq.solver.program import Row, Solution
from fxmpq.solver.programs import PROGRAMS, check_counted, check_program, program_of
from fxmpq.solver.ties import smallest


def solve(
    sensitivity: Sensitivity,
    costs: CostTable,
    budget: str | Mapping[str, object] | Budget,
    *,
    program: str | None = None,
    ties: Sequence[Sequence[str]] = (),
    solver: str = "cbc",
    time_limit: float = 60.0,
    max_gap: float = 0.0,
    **options: object,
) -> Plan:
    """Choose the precision of every group that loses least within a budget.

    Minimises the summed sensitivity under the budget's limits, or, for a budget with
    `minimize=`, a cost under a limit on the summed sensitivity. The optimum is proven: the
    plan holds the bound and the gap. Other forms of the program count interactions
    (`quadratic`) or are those of published methods (`greedy`, `lp`, `knapsack`).

    What format changes between groups cost (`CostTable.edges`) is counted, and a peak
    (`CostTable.moments`) is kept at every moment, whether they are limited or minimised.

    Args:
        sensitivity: Of every group and precision.
        costs: Of the same groups and precisions.
        budget: As `Budget.parse` reads it.
        program: A key of `PROGRAMS`; the sensitivity method's own if `None`, which is
            `quadratic` for `projected` and `pairwise`, and `ilp` for all others, for budgets
            with `minimize=` and for limits on costs with format changes, which only `ilp` counts.
        ties: Groups that must take the same precision.
        solver: `cbc` or `highs`.
        time_limit: Seconds, after which the best plan found is returned as `feasible`.
        max_gap: Relative gap at which the solver may stop.
        **options: Of the program, as `rounding="search"` for `lp`.

    Returns:
        The plan.

    Raises:
        InfeasibleBudgetError: If nothing meets the budget, with each limit and the smallest
            value reachable.
        BudgetError: If the budget asks for an SQNR and the sensitivity is no noise power, or
            minimises a cost or limits one with format changes in another program than `ilp`.
        FxmpqError: If the tables do not belong together, or the program or an option is
            unknown.

    Examples:
        >>> sensitivity = Sensitivity({"a": {"w4a8": 0.1, "w8a8": 0.0}})
        >>> costs = CostTable({"weights": {"a": {"w4a8": 50, "w8a8": 100}}})
        >>> solve(sensitivity, costs, {"weights": 60}).choices
        {'a': 'w4a8'}
    """
    check_tables(sensitivity, costs)
    wanted = Budget.parse(budget)
    limited = [limit.metric for limit in wanted.limits]
    is_plain = wanted.minimize is None and costs.edges.keys().isdisjoint(limited)
    interacts = is_plain and sensitivity.projections is not None
    form = program or (program_of(sensitivity.method) if interacts else "ilp")
    check_program(form, options)
    check_counted(form, limited, costs)
    _check_budget(wanted, sensitivity, form)
    limits = wanted.resolve(costs)
    wanted.check_feasible(costs)
    rows = [row for limit in limits for row in limit_rows(costs, limit.metric, limit.amount)]
    shared = {"ties": ties, "solver": solver, "time_limit": time_limit, "max_gap": max_gap}
    minimized = wanted.minimize
    try:
        if minimized is not None and wanted.loss is not None:
            found = _minimized(minimized, wanted.loss, sensitivity, costs, rows, shared)
        else:
            found = PROGRAMS[form](sensitivity, costs, rows, **shared, **options)
    except InfeasibleBudgetError as error:
        raise InfeasibleBudgetError(_explain(wanted, sensitivity, costs, ties)) from error
    summed = math.fsum(sensitivity.values[group][name] for group, name in found.choices.items())
    return plan_of(
        found,
        sensitivity,
        costs,
        budget=str(wanted),
        program=form,
        loss=summed if minimized is not None else found.objective,
    )


def _minimized(
    metric: str,
    most: float,
    sensitivity: Sensitivity,
    costs: CostTable,
    rows: Sequence[Row],
    shared: Mapping[str, Any],
) -> Solution:
    """The choice of least cost whose loss is within a limit."""
    if metric in costs.moments:
        return minimize_peak(costs.moments[metric], sensitivity.values, most, rows, **shared)
    within = [*rows, Row(sensitivity.values, most)]
    edges = costs.edges.get(metric, ())
    return solve_rows(costs.costs[metric], within, edges=edges, **shared)


def _check_budget(budget: Budget, sensitivity: Sensitivity, form: str) -> None:
    if budget.minimize is not None and form != "ilp":
        raise BudgetError(
            f"minimising {budget.minimize!r} is a program of its own; ask for it with "
            f"program='ilp' instead of {form!r}"
        )
    if budget.in_decibels and sensitivity.unit != "noise":
        raise BudgetError(
            f"the budget limits the SQNR, and the method {sensitivity.method!r} measures a "
            f"{sensitivity.unit}; limit that with 'loss=', or measure with 'projected' or 'sqnr'"
        )


def _explain(
    budget: Budget, sensitivity: Sensitivity, costs: CostTable, ties: Sequence[Sequence[str]]
) -> str:
    if budget.loss is None:
        return infeasible_message(budget.resolve(costs), costs, ties)
    least = smallest(sensitivity.values, ties)
    limit = f"  loss at most {budget.loss:.4g}; the smallest loss reachable is {least:.4g}"
    if not budget.limits or least > budget.loss:
        return (
            f"no choice of precisions meets the loss limit\n{limit}\n"
            "Raise the limit, or allow candidates with more bits."
        )
    return f"{infeasible_message(budget.resolve(costs), costs, ties)}\n{limit}"
