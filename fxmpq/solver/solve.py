"""Solve: from sensitivities, costs and a budget to a plan."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from fxmpq.costs.table import CostTable
from fxmpq.errors import FxmpqError, InfeasibleBudgetError
from fxmpq.sensitivity.sensitivity import Sensitivity
from fxmpq.solver.budget import Budget, infeasible_message
from fxmpq.solver.plan import Plan
from fxmpq.solver.program import Row, solve_program
from fxmpq.solver.ties import smallest


def solve(
    sensitivity: Sensitivity,
    costs: CostTable,
    budget: str | Mapping[str, object] | Budget,
    *,
    ties: Sequence[Sequence[str]] = (),
    solver: str = "cbc",
    time_limit: float = 60.0,
    max_gap: float = 0.0,
) -> Plan:
    """Choose the precision of every group that loses least within a budget.

    Minimises the summed sensitivity under the budget's limits, or, for a budget with
    `minimize=`, a cost under a limit on the summed sensitivity. The optimum is proven: the
    plan holds the bound and the gap.

    Args:
        sensitivity: Of every group and precision.
        costs: Of the same groups and precisions.
        budget: As `Budget.parse` reads it.
        ties: Groups that must take the same precision.
        solver: `cbc` or `highs`.
        time_limit: Seconds, after which the best plan found is returned as `feasible`.
        max_gap: Relative gap at which the solver may stop.

    Returns:
        The plan.

    Raises:
        InfeasibleBudgetError: If nothing meets the budget, with each limit and the smallest
            value reachable.
        FxmpqError: If the tables do not belong together.

    Examples:
        >>> sensitivity = Sensitivity({"a": {"w4a8": 0.1, "w8a8": 0.0}})
        >>> costs = CostTable({"weights": {"a": {"w4a8": 50, "w8a8": 100}}})
        >>> solve(sensitivity, costs, {"weights": 60}).choices
        {'a': 'w4a8'}
    """
    _check_tables(sensitivity, costs)
    wanted = Budget.parse(budget)
    limits = wanted.resolve(costs)
    wanted.check_feasible(costs)
    rows = [
        Row(costs.costs[limit.metric], limit.amount - costs.fixed.get(limit.metric, 0))
        for limit in limits
    ]
    objective = sensitivity.values
    if wanted.minimize is not None and wanted.loss is not None:
        objective = costs.costs[wanted.minimize]
        rows.append(Row(sensitivity.values, wanted.loss))
    try:
        found = solve_program(
            objective, rows, ties=ties, solver=solver, time_limit=time_limit, max_gap=max_gap
        )
    except InfeasibleBudgetError as error:
        raise InfeasibleBudgetError(_explain(wanted, sensitivity, costs, ties)) from error
    totals = {metric: costs.total(metric, found.choices) for metric in costs.metrics}
    return Plan(
        choices=found.choices,
        budget=str(wanted),
        method=sensitivity.method,
        fingerprint=sensitivity.fingerprint or costs.fingerprint,
        loss=math.fsum(sensitivity.values[group][name] for group, name in found.choices.items()),
        costs=totals,
        relative={
            metric: total / costs.float_total[metric]
            for metric, total in totals.items()
            if costs.float_total.get(metric)
        },
        gap=found.gap,
        bound=found.bound,
        status=found.status,
        seconds=found.seconds,
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


def _check_tables(sensitivity: Sensitivity, costs: CostTable) -> None:
    if set(sensitivity.values) != set(costs.groups):
        difference = sorted(set(sensitivity.values) ^ set(costs.groups))
        raise FxmpqError(
            f"sensitivity and costs cover different groups; only one of them has {difference[:5]}"
        )
    for group, row in sensitivity.values.items():
        if set(row) != set(costs.precisions(group)):
            raise FxmpqError(
                f"group {group!r} has sensitivities for {', '.join(row)} but costs for "
                f"{', '.join(costs.precisions(group))}"
            )
    prints = {sensitivity.fingerprint, costs.fingerprint} - {None}
    if len(prints) > 1:
        raise FxmpqError(
            "sensitivity and costs were made from different models: fingerprints "
            f"{sensitivity.fingerprint} and {costs.fingerprint}"
        )
