"""The Pareto front of loss and a cost, by the epsilon constraint method, each point proven."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from fxmpq.costs.table import CostTable
from fxmpq.errors import BudgetError, InfeasibleBudgetError
from fxmpq.sensitivity.sensitivity import Sensitivity
from fxmpq.solver.branch import check_solver
from fxmpq.solver.budget import Budget, infeasible_message
from fxmpq.solver.edges import PairedProgram
from fxmpq.solver.front import ParetoFront
from fxmpq.solver.limits import limit_rows
from fxmpq.solver.pair_search import find_either
from fxmpq.solver.pairs import PairedInstance
from fxmpq.solver.plan import Plan
from fxmpq.solver.planning import check_tables, plan_of
from fxmpq.solver.program import Row, Solution, keeping_torch_threads
from fxmpq.solver.search import Found, Start

# A whole front of more points is refused; some of them can be had with `points=`.
MAX_POINTS = 10_000


def pareto(
    sensitivity: Sensitivity,
    costs: CostTable,
    metric: str = "weights",
    *,
    limits: str | Mapping[str, object] | Budget | None = None,
    points: int | None = None,
    ties: Sequence[Sequence[str]] = (),
    solver: str = "cbc",
    time_limit: float = 60.0,
) -> ParetoFront:
    """Find the plans that no other plan beats in summed sensitivity and in one cost.

    By the epsilon constraint method (Haimes, Lasdon and Wismer, 1971): the least loss

        min_c sum_g s_g(c_g)   subject to   sum_g C_g(c_g) <= limit,

    then the least cost among all plans of that loss, then the next limit: the cost reached less
    the smallest step between costs. Losses and costs are compared as exact decimals, and every
    plan is proven on both counts. Each program begins with the choice, the prices on the limits
    and the bound of its neighbour. Losses add up: interactions are not counted. It runs no
    network and needs no labels; a point takes two programs of a few milliseconds each.

    What format changes between groups cost (`CostTable.edges`) is counted, which takes about a
    second a point for 50 groups, and losses nearer to each other than the solver's tolerance then
    count as equal; further limits may be on peaks too.

    A whole front can be long: thousands of plans for 20 groups of 5 candidates, and tens of
    thousands for 75. `points` asks for the plans at that many limits, evenly spaced between the
    least cost and the cost of the least loss, both included; limits that lead to the same plan
    count once. Where each bit quarters the noise, points so spaced are evenly spaced in dB.

    Args:
        sensitivity: Of every group and precision.
        costs: Of the same groups and precisions.
        metric: The cost to trade for loss; no peak.
        limits: On further costs (or the same), kept by every plan, as `Budget.parse` reads them.
        points: How many limits, 2 or more; the whole front if `None`, up to `MAX_POINTS` plans.
        ties: Groups that must take the same precision.
        solver: `cbc` or `highs`.
        time_limit: Seconds for the whole front.

    Returns:
        The front, from the smallest cost to the largest.

    Raises:
        InfeasibleBudgetError: If no choice meets `limits`.
        BudgetError: If the limits or the number of points cannot be used, the metric is a peak,
            the front has more than `MAX_POINTS` plans, or time ran out.
        FxmpqError: If the tables do not belong together, or a name is unknown.

    Examples:
        >>> sensitivity = Sensitivity({"a": {"w4": 0.1, "w8": 0.0}, "b": {"w4": 0.3, "w8": 0.0}})
        >>> costs = CostTable({"weights": {group: {"w4": 4, "w8": 8} for group in "ab"}})
        >>> [(plan.costs["weights"], plan.loss) for plan in pareto(sensitivity, costs).plans]
        [(8, 0.4), (12, 0.1), (16, 0.0)]
    """
    check_tables(sensitivity, costs)
    check_solver(solver)
    if points is not None and points < 2:
        raise BudgetError(f"points={points} is no front; ask for 2 or more, or None for all")
    greatest = costs.largest(metric)
    if metric in costs.moments:
        raise BudgetError(
            f"{metric!r} is a peak, and a front is of sums; ask for plans at some limits on it, as "
            f"with solve(sensitivity, costs, {{{metric!r}: ...}})"
        )
    held = _held(limits, costs)
    resolved = () if held is None else held.resolve(costs)
    # The first limit is the one that moves.
    rows = [Row(costs.costs[metric], greatest, costs.edges.get(metric, ()))]
    for limit in resolved:
        rows += limit_rows(costs, limit.metric, limit.amount)
    program = PairedProgram.of_any(sensitivity.values, rows, ties)
    walk = _Walk(program.paired, solver, time_limit)
    with keeping_torch_threads():
        least = walk.least_cost()
        if least is None:
            raise InfeasibleBudgetError(infeasible_message(resolved, costs, ties))
        found = list(walk.points(least, points))
    plans = (_plan(point, program, sensitivity, costs, metric, held) for point in reversed(found))
    return ParetoFront(metric, tuple(plans), whole=points is None)


@dataclass(frozen=True)
class _Point:
    """A proven point in exact integers."""

    keys: frozenset[int]
    loss: int
    cost: int
    seconds: float


class _Walk:
    """From the least loss down to the least cost, each point beginning where the last ended."""

    def __init__(self, paired: PairedInstance, solver: str, seconds: float) -> None:
        self._solver = solver
        self._seconds = seconds
        self._deadline = time.monotonic() + seconds
        self._least_loss = paired
        self._least_cost = _turned(paired)
        self._others = paired.instance.limits[1:]
        self._start: Start | None = None
        self._prices: tuple[Fraction, ...] = ()
        self._found = 0

    def least_cost(self) -> int | None:
        """The least cost of any choice; `None` if there is no choice."""
        found = self._solve(self._least_cost, _most(self._least_cost), None)
        return None if found is None else found.objective

    def points(self, least: int, count: int | None) -> Iterator[_Point]:
        """Find the front from its largest cost.

        Args:
            least: Its smallest cost.
            count: Of limits; the whole front if `None`.
        """
        point = self._point(_most(self._least_loss))
        yield point
        greatest = point.cost
        for step in itertools.count(1):
            if point.cost <= least:
                return
            limit = point.cost - 1
            if count is not None:
                limit = least + (greatest - least) * (count - 1 - step) // (count - 1)
            elif step >= MAX_POINTS:
                raise BudgetError(
                    f"the front has more than {MAX_POINTS:,} points; ask for some of them, as "
                    "with points=100"
                )
            # A point within the limit is the one of least loss there, too.
            if point.cost > limit:
                point = self._point(limit)
                yield point

    def _point(self, limit: int) -> _Point:
        """The plan of least loss within a limit on the cost, below that of the point before."""
        began = time.perf_counter()
        first = self._solve(self._least_loss, limit, self._start)
        assert first is not None, "the limit is no less than the least cost"
        known = Start(first.keys, self._prices)
        second = self._solve(self._least_cost, first.objective, known)
        assert second is not None, "the first choice is one"
        # Less cost must lose more: else it had been the least cost of that loss.
        self._start = Start(second.keys, first.prices, floor=first.objective + 1)
        self._prices = second.prices
        self._found += 1
        seconds = time.perf_counter() - began
        return _Point(second.keys, first.objective, second.objective, seconds)

    def _solve(self, paired: PairedInstance, limit: int, start: Start | None) -> Found | None:
        left = self._deadline - time.monotonic()
        if left > 0:
            instance = replace(paired.instance, limits=(limit, *self._others))
            found = find_either(
                replace(paired, instance=instance),
                solver=self._solver,
                time_limit=left,
                max_gap=0.0,
                start=start,
            )
            if found is None or found.bound >= found.objective:
                return found
        raise BudgetError(
            f"{self._found} points of the front are proven after {self._seconds:g} s, and more are "
            "left; give it a longer time_limit, or ask for fewer points, as with points=20"
        )


def _turned(paired: PairedInstance) -> PairedInstance:
    """The same choices with the first cost as the value, and the value as the first cost."""
    groups = tuple(
        tuple(
            option._replace(value=option.costs[0], costs=(option.value, *option.costs[1:]))
            for option in group
        )
        for group in paired.instance.groups
    )
    pairs = tuple(
        replace(
            pair,
            entries={
                ends: (cost, value, *rest) for ends, (value, cost, *rest) in pair.entries.items()
            },
        )
        for pair in paired.pairs
    )
    return PairedInstance(replace(paired.instance, groups=groups), pairs)


def _most(paired: PairedInstance) -> int:
    """A limit on the first cost that every choice keeps."""
    options = sum(max(option.costs[0] for option in group) for group in paired.instance.groups)
    return options + sum(max(terms[1] for terms in p.entries.values()) for p in paired.pairs)


def _held(limits: str | Mapping[str, object] | Budget | None, costs: CostTable) -> Budget | None:
    if limits is None:
        return None
    held = Budget.parse(limits)
    if held.minimize is not None:
        raise BudgetError(
            f"the limits of a front are on costs, and '{held}' minimises one; a front lowers the "
            "loss and its metric"
        )
    held.check_feasible(costs)
    return held


def _plan(
    point: _Point,
    program: PairedProgram,
    sensitivity: Sensitivity,
    costs: CostTable,
    metric: str,
    held: Budget | None,
) -> Plan:
    chosen = program.program.choices(point.keys)
    choices = {group: chosen[group] for group in sensitivity.values}
    loss = float(Fraction(point.loss, program.scale))
    kept = () if held is None else held.limits
    others = [limit.text for limit in kept if limit.metric != metric]
    found = Solution(choices, loss, loss, "optimal", point.seconds)
    text = ",".join([f"{metric}={costs.total(metric, choices)}", *others])
    return plan_of(found, sensitivity, costs, budget=text, program="ilp", loss=loss)
