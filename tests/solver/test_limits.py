from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxmpq.costs.table import CostTable
from fxmpq.costs.terms import Edge, Moment
from fxmpq.errors import BudgetError
from fxmpq.solver import limits as module
from fxmpq.solver.edges import solve_rows
from fxmpq.solver.exact import within
from fxmpq.solver.limits import is_reachable, least_total, limit_rows
from fxmpq.solver.program import Row, Solution

NAMES = ("w4a8", "w8a8", "fp32")


@st.composite
def tables(draw: st.DrawFn) -> CostTable:
    groups = [f"g{index}" for index in range(draw(st.integers(2, 4)))]
    number = draw(st.sampled_from([st.integers(0, 9), st.sampled_from([0.1, 0.2, 0.3, 4.0])]))

    def row() -> dict[str, Any]:
        return {name: draw(number) for name in NAMES}

    pairs = draw(st.lists(st.sampled_from(list(itertools.permutations(groups, 2))), max_size=4))
    alive = draw(st.lists(st.sets(st.sampled_from(groups)), min_size=1, max_size=4))
    return CostTable(
        {metric: {group: row() for group in groups} for metric in ("weights", "us")},
        fixed={"us": draw(number)},
        edges={"us": [Edge(*ends, {name: row() for name in NAMES}) for ends in pairs]},
        moments={
            "peak": [
                Moment(str(index), draw(number), {group: row() for group in sorted(found)})
                for index, found in enumerate(alive)
            ]
        },
    )


@settings(max_examples=60, deadline=None)
@given(tables(), st.booleans())
def test_the_least_total_is_that_of_enumeration(table: CostTable, tied: bool) -> None:
    ties = [table.groups[:2]] if tied else []
    choices = [
        dict(zip(table.groups, names, strict=True))
        for names in itertools.product(NAMES, repeat=len(table.groups))
    ]
    kept = [c for c in choices if not tied or c[table.groups[0]] == c[table.groups[1]]]
    for metric in table.metrics:
        least = min(table.total(metric, choice) for choice in kept)
        found, is_reached = least_total(table, metric, ties)
        assert is_reached
        assert found == pytest.approx(least, rel=1e-12)
        assert table.smallest(metric) <= least * (1 + 1e-12)


def test_each_kind_of_limit_becomes_its_rows() -> None:
    row = {"w8a8": 10, "fp32": 40}
    edge = Edge("a", "b", {name: dict.fromkeys(row, 1) for name in row})
    moments = [Moment("n", 3, {"a": row}), Moment("m", 0, {"b": row})]
    rows = {"a": row, "b": row}
    table = CostTable(
        {"weights": rows, "us": rows},
        fixed={"us": 6},
        edges={"us": [edge]},
        moments={"peak": moments},
    )
    assert limit_rows(table, "weights", 30) == [Row(rows, 30)]
    assert limit_rows(table, "us", 30) == [Row(rows, 24, (edge,))]
    zeros = dict.fromkeys(row, 0)
    assert limit_rows(table, "peak", 30) == [
        Row({"a": row, "b": zeros}, 27),
        Row({"a": zeros, "b": row}, 30),
    ]


def test_a_limit_that_a_choice_meets_exactly_is_met_beside_a_large_fixed_part() -> None:
    # 1000.3 - 1000.0 is 0.2999999999999545.
    table = CostTable({"us": {"a": {"w8a8": 0.3, "fp32": 0.4}}}, fixed={"us": 1000.0})
    (row,) = limit_rows(table, "us", 1000.3)
    assert solve_rows({"a": {"w8a8": 1.0, "fp32": 0.0}}, [row]).choices == {"a": "w8a8"}


def test_without_the_time_for_a_proof_it_is_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"w8a8": 10, "fp32": 40}
    edge = Edge("a", "b", {"w8a8": {"w8a8": 9, "fp32": 2}, "fp32": {"w8a8": 3, "fp32": 4}})
    table = CostTable({"us": {"a": row, "b": row}}, fixed={"us": 5}, edges={"us": [edge]})
    assert least_total(table, "us") == (5 + 20 + 9, True)

    def late(*args: Any, **options: Any) -> Solution:
        raise BudgetError("no time is left")

    monkeypatch.setattr(module, "solve_rows", late)
    assert least_total(table, "us") == (5 + 20 + 2, False)

    def unproven(*args: Any, **options: Any) -> Solution:
        return Solution({"a": "w8a8", "b": "fp32"}, 52, 23, "feasible", 1.0)

    monkeypatch.setattr(module, "solve_rows", unproven)
    assert least_total(table, "us") == (5 + 23, False)


@settings(max_examples=40, deadline=None)
@given(tables(), st.floats(0, 1))
def test_a_limit_is_reachable_where_some_choice_keeps_it(table: CostTable, share: float) -> None:
    choices = [
        dict(zip(table.groups, names, strict=True))
        for names in itertools.product(NAMES, repeat=len(table.groups))
    ]
    for metric in table.metrics:
        totals = [table.total(metric, choice) for choice in choices]
        for amount in (share * max(totals), min(totals), min(totals) * 0.99):
            assert is_reachable(table, metric, amount) == any(within(t, amount) for t in totals)


def test_no_program_is_solved_where_the_cheapest_of_every_group_will_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    row = {"w8a8": 10, "fp32": 40}
    edge = Edge("a", "b", {"w8a8": {"w8a8": 9, "fp32": 2}, "fp32": {"w8a8": 3, "fp32": 4}})
    table = CostTable({"us": {"a": row, "b": row}}, edges={"us": [edge]})
    monkeypatch.setattr(module, "solve_rows", None)
    assert is_reachable(table, "us", 29)
    assert not is_reachable(table, "us", 21)
    monkeypatch.undo()
    assert not is_reachable(table, "us", 28)
