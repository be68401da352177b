"""From the tables and a solution to a plan."""

from __future__ import annotations

from fxmpq.costs.table import CostTable
from fxmpq.errors import FxmpqError
from fxmpq.sensitivity.sensitivity import Sensitivity
from fxmpq.solver.plan import Plan
from fxmpq.solver.program import Solution


def plan_of(
    solution: Solution,
    sensitivity: Sensitivity,
    costs: CostTable,
    *,
    budget: str,
    program: str,
    loss: float,
) -> Plan:
    """Write down what was chosen with everything that is known about it.

    Args:
        solution: What was chosen.
        sensitivity: That it was chosen by.
        costs: Of the same groups and precisions.
        budget: As asked.
        program: Form of the program.
        loss: Predicted loss of the choice.

    Returns:
        The plan, with its total of every cost.
    """
    totals = {metric: costs.total(metric, solution.choices) for metric in costs.metrics}
    return Plan(
        choices=solution.choices,
        budget=budget,
        method=sensitivity.method,
        program=program,
        unit=sensitivity.unit,
        fingerprint=sensitivity.fingerprint or costs.fingerprint,
        loss=loss,
        costs=totals,
        relative={
            metric: total / costs.float_total[metric]
            for metric, total in totals.items()
            if costs.float_total.get(metric)
        },
        gap=solution.gap,
        bound=solution.bound,
        status=solution.status,
        seconds=solution.seconds,
    )


def check_tables(sensitivity: Sensitivity, costs: CostTable) -> None:
    """Refuse tables that do not belong together.

    Raises:
        FxmpqError: If they differ in groups, precisions or models.
    """
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
