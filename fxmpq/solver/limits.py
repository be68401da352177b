"""Limits on what a cost table holds, whatever it holds: sums, sums with edges, and peaks."""

from __future__ import annotations

from collections.abc import Sequence

from fxmpq.costs.further import FURTHER
from fxmpq.costs.table import CostTable
from fxmpq.errors import BudgetError, closest
from fxmpq.solver.edges import solve_rows
from fxmpq.solver.exact import allowance, exact, within
from fxmpq.solver.peaks import minimize_peak, peak_rows
from fxmpq.solver.program import Row
from fxmpq.solver.ties import smallest

# For a message: an answer in time is worth more than the sharpest one.
_SECONDS = 10.0


def check_limited(metric: str, costs: CostTable, *others: str) -> None:
    """Refuse a budget on what a cost table does not hold.

    Args:
        metric: Named by a budget.
        costs: The table.
        others: Further names that a budget may have.

    Raises:
        BudgetError: Saying how to have the cost counted, or naming the closest.
    """
    if metric in costs.metrics:
        return
    if metric in FURTHER:
        raise BudgetError(
            f"the cost table has no {metric!r}; it is added by fxmpq.cost(graph, metric={metric!r})"
        )
    legal = [*costs.metrics, *others, *FURTHER]
    raise BudgetError(
        f"no cost {metric!r} to put a budget on; there are {closest(metric, legal, 8)}"
    )


def limit_rows(costs: CostTable, metric: str, amount: float) -> list[Row]:
    """Turn a limit on a cost into limits of the bit-width program.

    Args:
        costs: That has the metric.
        metric: A sum, with or without edges, or a peak.
        amount: What its total may come to.

    Returns:
        One limit for a sum; for a peak one a moment, without those that others make superfluous.

    Examples:
        >>> costs = CostTable({"weights": {"a": {"w4a8": 50, "w8a8": 100}}}, fixed={"weights": 10})
        >>> [row.limit for row in limit_rows(costs, "weights", 70)]
        [60]
    """
    if metric in costs.moments:
        return peak_rows(costs.moments[metric], amount, next(iter(costs.costs.values())))
    # Rounding the difference may put it below a sum that meets the limit exactly.
    whole = isinstance(costs.largest(metric), int)
    left = allowance(amount, whole=whole) - exact(costs.fixed.get(metric, 0))
    limit = left.numerator if left.denominator == 1 else left
    return [Row(costs.costs[metric], limit, costs.edges.get(metric, ()))]


def least_total(
    costs: CostTable, metric: str, ties: Sequence[Sequence[str]] = ()
) -> tuple[float, bool]:
    """Find the least total of a cost that one precision a group reaches.

    Args:
        costs: That has the metric.
        metric: A sum, with or without edges, or a peak.
        ties: Groups that must take the same precision.

    Returns:
        The total, and whether a choice reaches it: with edges or for a peak it is a bound where
        the program was not solved in ten seconds.

    Examples:
        >>> costs = CostTable({"weights": {"a": {"w4a8": 50, "w8a8": 100}}}, fixed={"weights": 10})
        >>> least_total(costs, "weights")
        (60, True)
    """
    fixed = costs.fixed.get(metric, 0)
    if metric not in costs.moments and metric not in costs.edges:
        return fixed + smallest(costs.costs[metric], ties), True
    try:
        if metric in costs.moments:
            rows = next(iter(costs.costs.values())).items()
            nothing = {group: dict.fromkeys(row, 0) for group, row in rows}
            moments = costs.moments[metric]
            found = minimize_peak(moments, nothing, 0, ties=ties, time_limit=_SECONDS)
        else:
            edges = costs.edges[metric]
            found = solve_rows(costs.costs[metric], [], edges=edges, ties=ties, time_limit=_SECONDS)
    except BudgetError:
        return costs.smallest(metric), False
    if found.status == "optimal":
        return costs.total(metric, found.choices), True
    return fixed + found.bound, False


def is_reachable(costs: CostTable, metric: str, amount: float) -> bool:
    """Whether some choice keeps a limit; where that is not known in ten seconds, it is allowed.

    Args:
        costs: That has the metric.
        metric: A sum, with or without edges, or a peak.
        amount: What its total may come to.

    Examples:
        >>> costs = CostTable({"weights": {"a": {"w4a8": 50, "w8a8": 100}}})
        >>> is_reachable(costs, "weights", 60), is_reachable(costs, "weights", 40)
        (True, False)
    """
    if not within(costs.smallest(metric), amount):
        return False
    # The cheapest precision of every group often keeps the limit: then no program is needed.
    cheap = {group: _cheapest(costs, metric, group) for group in costs.groups}
    if within(costs.total(metric, cheap), amount):
        return True
    return within(least_total(costs, metric)[0], amount)


def _cheapest(costs: CostTable, metric: str, group: str) -> str:
    tables = [costs.costs[metric]] if metric in costs.costs else []
    tables += [moment.rows for moment in costs.moments.get(metric, ()) if group in moment.rows]
    return min(
        costs.precisions(group), key=lambda name: sum(table[group][name] for table in tables)
    )
