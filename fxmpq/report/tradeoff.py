"""The trade-off curve: the best plan for every weight budget, from one set of measurements."""

from __future__ import annotations

import math

import numpy as np

from fxmpq.costs.table import CostTable
from fxmpq.report.report import CurvePoint
from fxmpq.sensitivity.sensitivity import Sensitivity
from fxmpq.solver.solve import solve


def trade_off(
    sensitivity: Sensitivity, costs: CostTable, *, points: int = 12
) -> tuple[CurvePoint, ...]:
    """Solve for weight budgets from the smallest possible to the largest useful one.

    Budgets are spaced evenly in the logarithm of the size, and met by the integer program.
    Nothing is measured again; other costs than `weights` are not limited.

    Args:
        sensitivity: From `measure`.
        costs: From `cost`, with the metric `weights`.
        points: Number of budgets, at least 2.

    Returns:
        Distinct plans by growing weight size, with their predicted output SQNR; a plan that
        is predicted to lose nothing is left out. None if the sensitivities are no noise powers.

    Examples:
        >>> sensitivity = Sensitivity({"a": {"w4a8": 0.1, "w8a8": 0.001}})
        >>> costs = CostTable({"weights": {"a": {"w4a8": 50, "w8a8": 100}}})
        >>> [point.weight_bytes for point in trade_off(sensitivity, costs)]
        [50, 100]
    """
    if sensitivity.unit != "noise":
        return ()
    smallest, largest = costs.smallest("weights"), costs.largest("weights")
    budgets = np.geomspace(max(smallest, 1), max(largest, 1), max(points, 2))
    # The ends exactly: rounding must not put the first budget below what is reachable.
    budgets[0], budgets[-1] = smallest, largest
    found: dict[int, float] = {}
    for budget in budgets:
        plan = solve(sensitivity, costs, {"weights": float(budget)}, program="ilp")
        decibels = plan.sqnr_db
        if decibels is not None and math.isfinite(decibels):
            found[round(costs.total("weights", plan.choices))] = decibels
    return tuple(CurvePoint(size, found[size]) for size in sorted(found))
