"""Plans under costs with format changes, and under peaks."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxmpq.costs.table import CostTable
from fxmpq.costs.terms import Edge, Moment
from fxmpq.errors import BudgetError, InfeasibleBudgetError
from fxmpq.sensitivity.sensitivity import Sensitivity
from fxmpq.solver.exact import within
from fxmpq.solver.plan import Plan
from fxmpq.solver.solve import solve

NAMES = ("w2a8", "w4a8", "w8a8")

# Two chained groups and a third: format changes cost time, and one moment is the largest.
CHANGE = {"w8a8": {"w8a8": 0, "fp32": 30}, "fp32": {"w8a8": 20, "fp32": 0}}


def further_tables() -> tuple[Sensitivity, CostTable]:
    losses = {"a": 0.5, "b": 0.2, "c": 0.1}
    times = {"a": (10, 40), "b": (10, 35), "c": (10, 50)}
    costs = CostTable(
        {
            "weights": {group: {"w8a8": 1, "fp32": 4} for group in losses},
            "latency": {
                g: dict(zip(("w8a8", "fp32"), pair, strict=True)) for g, pair in times.items()
            },
        },
        float_total={"weights": 12, "latency": 130, "memory": 80},
        fixed={"latency": 5},
        edges={"latency": [Edge("a", "b", CHANGE), Edge("b", "c", CHANGE)]},
        moments={
            "memory": [
                Moment("early", 0, {"a": {"w8a8": 10, "fp32": 40}, "b": {"w8a8": 10, "fp32": 40}}),
                Moment("late", 30, {"c": {"w8a8": 5, "fp32": 20}}),
            ]
        },
    )
    values = {group: {"w8a8": loss, "fp32": 0.0} for group, loss in losses.items()}
    return Sensitivity(values, "sqnr"), costs


def of(plan: Plan) -> str:
    return "".join("8" if name == "w8a8" else "f" for name in plan.choices.values())


def test_format_changes_are_part_of_a_limit() -> None:
    sensitivity, costs = further_tables()
    # Without them a alone would stay in float: 5 + 40 + 10 + 10 = 65, and 20 more with them.
    plan = solve(sensitivity, costs, "latency=80")
    assert (of(plan), plan.costs["latency"]) == ("888", 35)
    plan = solve(sensitivity, costs, "latency=85")
    assert (of(plan), plan.costs["latency"]) == ("f88", 85)
    assert plan.relative["latency"] == pytest.approx(85 / 130)
    assert (plan.program, plan.status, plan.gap) == ("ilp", "optimal", 0.0)
    # Two neighbours in float change formats once only.
    plan = solve(sensitivity, costs, "latency=110")
    assert (of(plan), plan.costs["latency"]) == ("ff8", 110)


def test_a_peak_is_kept_at_every_moment() -> None:
    sensitivity, costs = further_tables()
    for budget, choices, peak in (
        ("memory=50", "f8f", 50),
        ("memory=49", "888", 35),
        ("memory=75%", "f8f", 50),
        ("memory=80", "fff", 80),
    ):
        plan = solve(sensitivity, costs, budget)
        assert (of(plan), plan.costs["memory"]) == (choices, peak)
    for program in ("greedy", "lp"):
        plan = solve(sensitivity, costs, "memory=50,weights=100%", program=program)
        assert plan.costs["memory"] <= 50


def test_a_cost_with_format_changes_or_a_peak_is_minimised() -> None:
    sensitivity, costs = further_tables()
    plan = solve(sensitivity, costs, "minimize=latency,loss=0.3")
    assert (of(plan), plan.costs["latency"], plan.bound) == ("f88", 85, 80)
    plan = solve(sensitivity, costs, "minimize=latency,loss=0.1")
    assert (of(plan), plan.costs["latency"]) == ("ff8", 5 + 40 + 35 + 10 + 20)
    plan = solve(sensitivity, costs, "minimize=memory,loss=0.3")
    assert (of(plan), plan.costs["memory"], plan.loss) == ("f8f", 50, 0.2)
    assert (plan.bound, plan.gap) == (50, 0.0)
    # The peak of one in float, and of those the one that is fast enough.
    plan = solve(sensitivity, costs, "minimize=memory,loss=0.3,latency=85")
    assert (of(plan), plan.costs["memory"], plan.loss) == ("f88", 50, pytest.approx(0.3))
    assert of(solve(sensitivity, costs, "minimize=weights,loss=0.3,latency=85")) == "f88"


def test_limits_on_all_kinds_of_costs_at_once() -> None:
    sensitivity, costs = further_tables()
    assert of(solve(sensitivity, costs, "latency=85,memory=60,weights=6")) == "f88"
    assert (
        of(solve(sensitivity, costs, "latency=90,memory=60,weights=9", ties=[("b", "c")])) == "f88"
    )
    with pytest.raises(InfeasibleBudgetError, match="each limit can be met alone") as caught:
        solve(sensitivity, costs, "minimize=latency,loss=0.2,latency=110,memory=49")
    assert "loss at most 0.2; the smallest loss reachable is 0" in str(caught.value)


def test_infeasible_limits_name_the_least_with_format_changes() -> None:
    sensitivity, costs = further_tables()
    dear = {name: dict.fromkeys(row, 7) for name, row in CHANGE.items()}
    costs = replace(costs, edges={"latency": [Edge("a", "b", dear)]})
    with pytest.raises(InfeasibleBudgetError) as caught:
        solve(sensitivity, costs, "latency=41,memory=34")
    message = str(caught.value)
    assert (
        "latency=41: at most 41; the smallest value reachable is 42 (32.31 % of float)" in message
    )
    assert "memory=34: at most 34; the smallest value reachable is 35" in message
    assert message.count("not reachable") == 2


def test_other_programs_refuse_format_changes() -> None:
    sensitivity, costs = further_tables()
    for program in ("greedy", "lp", "knapsack", "quadratic"):
        with pytest.raises(BudgetError, match=f"'latency' counts format changes.*{program!r}"):
            solve(sensitivity, costs, "latency=90", program=program)
        # Limits on other costs of the same table are theirs to keep.
    assert of(solve(sensitivity, costs, "weights=9", program="knapsack")) == "ff8"
    rows = [[0.7, 0.0, 0.4, 0.0, 0.3, 0.0]]
    projected = Sensitivity(sensitivity.values, "projected", None, rows)  # type: ignore[arg-type]
    assert solve(projected, costs, "weights=9").program == "quadratic"
    assert solve(projected, costs, "memory=50").program == "quadratic"
    assert solve(projected, costs, "weights=9,latency=90").program == "ilp"


@st.composite
def further_cases(draw: st.DrawFn) -> tuple[Sensitivity, CostTable]:
    groups = [f"g{index}" for index in range(draw(st.integers(2, 4)))]
    number = st.integers(0, 20)

    def row() -> dict[str, int]:
        return {name: draw(number) for name in NAMES}

    values = {g: {name: draw(st.floats(1e-12, 1e3)) for name in NAMES} for g in groups}
    ends = st.sampled_from(list(itertools.permutations(groups, 2)))
    alive = st.lists(st.sets(st.sampled_from(groups)), min_size=1, max_size=3)
    return Sensitivity(values), CostTable(
        {metric: {group: row() for group in groups} for metric in ("weights", "latency")},
        fixed={"latency": draw(number)},
        edges={
            "latency": [
                Edge(*found, {name: row() for name in NAMES})
                for found in draw(st.lists(ends, max_size=4))
            ]
        },
        moments={
            "memory": [
                Moment(str(i), draw(number), {group: row() for group in sorted(found)})
                for i, found in enumerate(draw(alive))
            ]
        },
    )


@settings(max_examples=60, deadline=None)
@given(
    further_cases(),
    st.sampled_from([None, "weights", "latency", "memory"]),
    st.tuples(*[st.none() | st.floats(0.01, 1)] * 3),
    st.floats(0, 1),
)
def test_every_budget_against_enumeration(
    case: tuple[Sensitivity, CostTable],
    minimized: str | None,
    shares: tuple[float | None, ...],
    most: float,
) -> None:
    sensitivity, costs = case
    metrics = ("weights", "latency", "memory")
    budget: dict[str, Any] = {
        metric: max(round(share * costs.largest(metric)), 1)
        for metric, share in zip(metrics, shares, strict=True)
        if share is not None
    }
    every = [
        dict(zip(costs.groups, names, strict=True))
        for names in itertools.product(NAMES, repeat=len(costs.groups))
    ]
    losses = [math.fsum(sensitivity.value(g, n) for g, n in found.items()) for found in every]
    fitting = [
        (loss, choice)
        for loss, choice in zip(losses, every, strict=True)
        if all(costs.total(metric, choice) <= limit for metric, limit in budget.items())
    ]
    if minimized is not None:
        limit = min(losses) + most * (max(losses) - min(losses))
        fitting = [(loss, choice) for loss, choice in fitting if within(loss, limit)]
        budget |= {"minimize": minimized, "loss": limit}
    elif not budget:
        return
    if not fitting:
        with pytest.raises(InfeasibleBudgetError):
            solve(*case, budget)
        return
    plan = solve(*case, budget)
    assert (plan.status, plan.gap) == ("optimal", 0.0)
    assert all(plan.costs[m] == costs.total(m, plan.choices) for m in metrics)
    assert all(plan.costs[m] <= budget[m] for m in metrics if m in budget)
    if minimized is None:
        assert plan.loss == pytest.approx(min(loss for loss, _ in fitting), rel=1e-9)
    else:
        assert plan.costs[minimized] == min(costs.total(minimized, c) for _, c in fitting)
