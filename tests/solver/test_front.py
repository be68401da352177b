from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxmpq.errors import BudgetError, FileFormatError, InfeasibleBudgetError, PlanError
from fxmpq.solver.front import ParetoFront
from fxmpq.solver.plan import Plan

sums = st.lists(st.integers(0, 10**15) | st.floats(0, 1e9), min_size=1, max_size=6, unique=True)


def front(*points: tuple[float, float], total: float | None = None) -> ParetoFront:
    plans = (
        Plan(
            {"a": "w4a8"},
            loss=loss,
            costs={"weights": cost},
            relative={} if total is None else {"weights": cost / total},
        )
        for cost, loss in points
    )
    return ParetoFront("weights", tuple(plans))


@given(costs=sums, losses=sums, whole=st.booleans())
def test_json_round_trip_is_exact(costs: list[float], losses: list[float], whole: bool) -> None:
    points = zip(sorted(costs), sorted(losses, reverse=True), strict=False)
    plans = front(*points, total=7).plans
    found = ParetoFront("weights", plans, whole=whole)
    assert ParetoFront.from_json(found.to_json()) == found


def test_a_file(tmp_path: Path) -> None:
    path = tmp_path / "front.json"
    found = front((1, 0.5), (2, 0.25))
    found.to_json(path)
    assert ParetoFront.from_json(path) == found
    assert (found.costs, found.losses) == ((1, 2), (0.5, 0.25))


@given(
    points=st.lists(st.tuples(st.integers(1, 20), st.integers(0, 20)), min_size=1),
    budget=st.integers(1, 22),
)
def test_the_plan_at_a_budget_loses_least_within_it(
    points: list[tuple[int, int]], budget: int
) -> None:
    chain: list[tuple[int, int]] = []
    for cost, loss in sorted(set(points)):
        if not chain or loss < chain[-1][1]:
            chain.append((cost, loss))
    fitting = [loss for cost, loss in points if cost <= budget]
    found = front(*chain, total=20)
    if not fitting:
        with pytest.raises(InfeasibleBudgetError, match=f"the smallest takes {chain[0][0]}"):
            found.at(budget)
        return
    assert found.at(budget).loss == min(fitting)
    assert found.at(f"{5 * budget}%") == found.at(budget)


def test_amounts_are_read_as_in_a_budget() -> None:
    found = front((1000, 3.0), (1024, 2.0), (1025, 1.0), total=4096)
    assert found.at("1kB").loss == 3.0
    assert found.at("1KiB").loss == 2.0
    assert found.at("25%").loss == 2.0
    with pytest.raises(InfeasibleBudgetError, match=r"within weights=20%.* 1,000 \(24.41 % of"):
        found.at("20%")
    with pytest.raises(BudgetError, match="cannot read the amount 'much' of 'weights'"):
        found.at("much")


def test_a_share_needs_plans_that_know_theirs() -> None:
    with pytest.raises(BudgetError, match="'weights=20%' is relative, but the plans do not say"):
        front((1, 0.5)).at("20%")


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ([], "at least one plan"),
        ([(1, 0.5), (2, 0.6)], "cost 1 and loss 0.5 is followed by one of 2 and 0.6"),
        ([(2, 0.5), (1, 0.4)], "must grow in 'weights' and fall in loss"),
    ],
)
def test_what_is_no_front(points: list[tuple[float, float]], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        front(*points)


@pytest.mark.parametrize("plan", [Plan({"a": "w4a8"}, loss=1.0), Plan({"a": "w4a8"})])
def test_plans_without_numbers_are_refused(plan: Plan) -> None:
    with pytest.raises(PlanError, match="needs its loss and its cost 'weights'"):
        ParetoFront("weights", (plan,))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": "fxmpq.plan"}, "expected the schema 'fxmpq.front'; found 'fxmpq.plan'"),
        ({"knee": 1}, r"unknown fields \['knee'\]"),
        ({"plans": {}}, "'plans' must be a list of objects"),
        ({"plans": [3]}, "'plans' must be a list of objects"),
        ({"plans": []}, "at least one plan"),
        ({"plans": [{"colour": 1}]}, "fxmpq.front: .*colour"),
        ({"plans": [{"choices": {"a": "w9a8"}}]}, "no 9-bit"),
        ({"metric": "bops"}, "its cost 'bops'"),
    ],
)
def test_a_file_that_holds_something_else_is_refused(changes: dict[str, Any], message: str) -> None:
    found = json.loads(front((1, 0.5)).to_json())
    with pytest.raises(FileFormatError, match=message):
        ParetoFront.from_json(json.dumps(found | changes))
