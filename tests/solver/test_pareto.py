from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxmpq.costs.table import CostTable
from fxmpq.costs.terms import Edge, Moment
from fxmpq.errors import InfeasibleBudgetError
from fxmpq.sensitivity.sensitivity import Sensitivity
from fxmpq.solver import lists
from fxmpq.solver import pareto as module
from fxmpq.solver.exact import exact, within
from fxmpq.solver.front import ParetoFront
from fxmpq.solver.pair_search import find_either
from fxmpq.solver.pareto import pareto
from fxmpq.solver.solve import solve

from .conftest import Tables, sizes

NAMES = ("w2a8", "w4a8", "w8a8")
Sums = tuple[Fraction, Fraction]
# Equal, equal as decimals only, and apart by less than any solver's tolerance.
close = st.sampled_from([0.0, 0.1, 0.2, 0.3, 0.30000000000000004, 1.0, 1.0000000000000002])
losses = st.sampled_from([st.integers(-2, 3).map(float), close, st.floats(1e-12, 1e3)])
prices = st.sampled_from([st.integers(0, 4), st.integers(0, 10**9), close])


@st.composite
def tables(draw: st.DrawFn) -> Tables:
    """Small enough to enumerate, with ties among losses and costs, and costs of zero."""
    groups = [f"g{index}" for index in range(draw(st.integers(1, 5)))]
    options = {group: NAMES[: draw(st.integers(1, 3))] for group in groups}

    def table(entry: st.SearchStrategy[Any]) -> dict[str, dict[str, Any]]:
        return {group: {name: draw(entry) for name in options[group]} for group in groups}

    costs = {metric: table(draw(prices)) for metric in ("weights", "bops")}
    fixed = {"weights": draw(st.integers(0, 3)), "bops": draw(st.integers(0, 3))}
    return Sensitivity(table(draw(losses))), CostTable(costs, {"bops": 40}, fixed)


def sums(tables: Tables, choice: dict[str, str], metric: str) -> Sums:
    """Cost and loss without rounding; the cost without its fixed part."""
    sensitivity, costs = tables
    return (
        sum((exact(costs.costs[metric][g][name]) for g, name in choice.items()), Fraction(0)),
        sum((exact(sensitivity.values[g][name]) for g, name in choice.items()), Fraction(0)),
    )


def choices(tables: Tables, ties: Iterable[Iterable[str]] = ()) -> list[dict[str, str]]:
    rows = tables[0].values
    every = [dict(zip(rows, names, strict=True)) for names in itertools.product(*rows.values())]
    return [
        choice
        for choice in every
        if all(len({choice[group] for group in tie}) == 1 for tie in ties)
    ]


def undominated(found: Iterable[Sums]) -> list[Sums]:
    """Sumss of cost and loss that no other beats, by growing cost and falling loss."""
    kept: list[Sums] = []
    for cost, loss in sorted(set(found)):
        if not kept or loss < kept[-1][1]:
            kept.append((cost, loss))
    return kept


def found_sums(tables: Tables, front: ParetoFront) -> list[Sums]:
    return [sums(tables, dict(plan.choices), front.metric) for plan in front.plans]


@settings(max_examples=120, deadline=None)
@given(tables=tables())
def test_the_whole_front_is_that_of_enumeration(tables: Tables) -> None:
    front = pareto(*tables)
    expected = undominated(sums(tables, choice, "weights") for choice in choices(tables))
    assert found_sums(tables, front) == expected
    assert front.whole
    for plan, (_, loss) in zip(front.plans, expected, strict=True):
        assert plan.costs == {m: tables[1].total(m, plan.choices) for m in ("weights", "bops")}
        assert (plan.loss, plan.gap, plan.bound) == (float(loss), 0.0, plan.loss)
        assert (plan.status, plan.method, plan.program) == ("optimal", "given", "ilp")


@settings(max_examples=80, deadline=None)
@given(tables=tables(), limit=st.integers(1, 40), tied=st.booleans())
def test_further_limits_and_ties_hold_on_every_point(
    tables: Tables, limit: int, tied: bool
) -> None:
    rows = tables[0].values
    ends = [next(iter(rows)), next(reversed(rows))]
    ties = [ends] if tied and len({tuple(rows[group]) for group in ends}) == 1 else []
    expected = undominated(
        sums(tables, choice, "weights")
        for choice in choices(tables, ties)
        if within(tables[1].total("bops", choice), limit)
    )
    if not expected:
        with pytest.raises(InfeasibleBudgetError, match=f"bops={limit}: at most {limit}"):
            pareto(*tables, limits={"bops": limit}, ties=ties)
        return
    front = pareto(*tables, limits={"bops": limit}, ties=ties)
    assert found_sums(tables, front) == expected
    assert all(within(plan.costs["bops"], limit) for plan in front.plans)
    assert all(str(plan.budget).endswith(f",bops={limit}") for plan in front.plans)


@pytest.mark.parametrize("solver", ["cbc", "highs"])
@settings(max_examples=30, deadline=None)
@given(tables=tables())
def test_the_solvers_find_the_same_front(solver: str, tables: Tables) -> None:
    """Without the exact lists; where losses differ by more than a solver can tell apart."""
    values = {
        group: {name: round(value, 3) for name, value in row.items()}
        for group, row in tables[0].values.items()
    }
    rounded = Sensitivity(values), tables[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lists, "_MOST", 0)
        front = pareto(*rounded, solver=solver)
    expected = undominated(sums(rounded, choice, "weights") for choice in choices(rounded))
    assert found_sums(rounded, front) == expected


@settings(max_examples=150, deadline=None)
@given(tables=tables(), points=st.integers(2, 9))
def test_points_are_those_of_the_whole_front_at_spaced_limits(tables: Tables, points: int) -> None:
    whole = undominated(sums(tables, choice, "weights") for choice in choices(tables))
    found = found_sums(tables, front := pareto(*tables, points=points))
    assert not front.whole
    least, greatest = whole[0][0], whole[-1][0]
    limits = [least + (greatest - least) * step / (points - 1) for step in range(points)]
    expected = {max(point for point in whole if point[0] <= limit) for limit in limits}
    assert found == sorted(expected)


@pytest.mark.parametrize("points", [2, 3, 4, 7, 12, 40])
def test_points_of_a_long_front(points: int) -> None:
    tables = sizes(9)
    whole = found_sums(tables, pareto(*tables))
    assert len(whole) > 30
    found = found_sums(tables, pareto(*tables, points=points))
    least, greatest = whole[0][0], whole[-1][0]
    limits = [least + (greatest - least) * step / (points - 1) for step in range(points)]
    assert found == sorted({max(point for point in whole if point[0] <= limit) for limit in limits})
    assert (found[0], found[-1]) == (whole[0], whole[-1])


@pytest.mark.parametrize("budget", ["7%", "12.5%", "19%", 97, 250.5])
def test_the_plan_at_a_budget_is_solves(budget: str | float) -> None:
    tables = sizes(6)
    at, solved = pareto(*tables).at(budget), solve(*tables, {"weights": budget})
    assert at.loss == solved.loss
    assert at.costs["weights"] <= solved.costs["weights"]
    again = solve(*tables, str(at.budget))
    assert (again.loss, again.costs["weights"]) == (at.loss, at.costs["weights"])


def test_starting_from_the_neighbour_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    tables = sizes(7)
    warm = pareto(*tables, limits="bops=9000")
    starts = []

    def cold(*args: Any, start: Any, **kwargs: Any) -> Any:
        starts.append(start)
        return find_either(*args, **kwargs)

    monkeypatch.setattr(module, "find_either", cold)
    found = pareto(*tables, limits="bops=9000")
    assert found_sums(tables, found) == found_sums(tables, warm)
    # All but the first two programs had a neighbour to begin from.
    assert sum(start is None for start in starts) == 2 < len(starts)


def test_a_unit_and_a_fingerprint_reach_the_plans() -> None:
    values = {"a": {"w4a8": 3.0, "w8a8": 1.0}}
    costs = CostTable({"weights": {"a": {"w4a8": 4, "w8a8": 8}}}, {"weights": 32}, fingerprint="f")
    front = pareto(Sensitivity(values, "entropy", unit="score"), costs)
    assert [plan.unit for plan in front.plans] == ["score", "score"]
    assert [plan.relative["weights"] for plan in front.plans] == [0.125, 0.25]
    assert {(plan.method, plan.fingerprint) for plan in front.plans} == {("entropy", "f")}
    assert all(math.isfinite(plan.seconds or 0.0) for plan in front.plans)


@st.composite
def tables_with_terms(draw: st.DrawFn) -> Tables:
    """The same with format changes between groups, and a peak."""
    sensitivity, costs = draw(tables())
    groups = list(costs.groups)
    entry = draw(prices)

    def row(group: str) -> dict[str, Any]:
        return {name: draw(entry) for name in costs.precisions(group)}

    pairs = list(itertools.permutations(groups, 2))
    ends = draw(st.lists(st.sampled_from(pairs), max_size=3)) if pairs else []
    edges = [Edge(a, b, {name: row(b) for name in costs.precisions(a)}) for a, b in ends]
    moments = [
        Moment("one", 1, {groups[0]: row(groups[0])}),
        Moment("all", 0, {g: row(g) for g in groups}),
    ]
    return sensitivity, replace(costs, edges={"weights": edges}, moments={"peak": moments})


def exact_sums(tables: Tables, choice: dict[str, str]) -> Sums:
    cost, loss = sums(tables, choice, "weights")
    edges = tables[1].edges.get("weights", ())
    return cost + sum((exact(edge.cost(choice)) for edge in edges), Fraction(0)), loss


@settings(max_examples=50, deadline=None)
@given(found=tables_with_terms(), limit=st.none() | st.integers(1, 40))
def test_fronts_count_format_changes_and_keep_peaks(found: Tables, limit: int | None) -> None:
    sensitivity, costs = found
    # Losses that a solver can tell apart; the cost is exact whatever it is.
    whole = {g: {n: round(v * 8) for n, v in row.items()} for g, row in sensitivity.values.items()}
    given = (Sensitivity(whole), costs)
    expected = undominated(
        exact_sums(given, choice)
        for choice in choices(given)
        if limit is None or within(costs.total("peak", choice), limit)
    )
    limits = None if limit is None else {"peak": limit}
    if not expected:
        with pytest.raises(InfeasibleBudgetError, match=f"peak={limit}: at most {limit}"):
            pareto(*given, limits=limits)
        return
    front = pareto(*given, limits=limits)
    assert [exact_sums(given, dict(plan.choices)) for plan in front.plans] == expected
    for plan in front.plans:
        assert plan.costs["weights"] == costs.total("weights", plan.choices)
        assert limit is None or within(plan.costs["peak"], limit)
