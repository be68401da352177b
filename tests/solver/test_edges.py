from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxmpq.costs.terms import Edge
from fxmpq.errors import BudgetError, FxmpqError, InfeasibleBudgetError
from fxmpq.solver.edges import PairedProgram, solve_rows, solve_with_edges
from fxmpq.solver.exact import allowance, exact
from fxmpq.solver.program import Row, solve_program

NAMES = ("w2a8", "w4a8", "w8a8", "fp32")
Values = dict[str, dict[str, Any]]
Choice = dict[str, str]

losses = st.integers(-3, 40) | st.floats(1e-9, 1.0) | st.sampled_from([0.1, 0.2, 0.3, 0.0])
prices = st.integers(0, 9) | st.sampled_from([0.1, 0.2, 0.3, 0.7]) | st.integers(0, 10**9)


@st.composite
def edges_of(draw: st.DrawFn, options: dict[str, tuple[str, ...]]) -> tuple[Edge, ...]:
    """Random edges: of codes and float only, or of every two precisions."""
    pairs = list(itertools.permutations(options, 2))
    found = []
    for left, right in draw(st.lists(st.sampled_from(pairs), max_size=7)) if pairs else ():
        by_class = draw(st.booleans())
        entry = {(a, b): draw(prices) for a in (True, False) for b in (True, False)}

        def value(name: str, other: str, by_class: bool = by_class, entry: Any = entry) -> Any:
            return entry[name == "fp32", other == "fp32"] if by_class else draw(prices)

        costs = {a: {b: value(a, b) for b in options[right]} for a in options[left]}
        found.append(Edge(left, right, costs))
    return tuple(found)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Values, list[Row], tuple[Edge, ...], list[list[str]]]:
    groups = [f"g{index}" for index in range(draw(st.integers(1, 6)))]
    options = {group: NAMES[draw(st.integers(0, 3)) :] for group in groups}
    if draw(st.booleans()):
        options = dict.fromkeys(groups, NAMES)

    def table(entry: st.SearchStrategy[Any]) -> Values:
        return {group: {name: draw(entry) for name in options[group]} for group in groups}

    rows = []
    for _ in range(draw(st.integers(0, 3))):
        cost, edges = table(prices), draw(edges_of(options))
        low = sum(min(row.values()) for row in cost.values())
        high = sum(max(row.values()) for row in cost.values()) * 1.2
        limit = draw(st.floats(0, 1)) * (high - low) + low
        rows.append(Row(cost, limit, edges))
    tied = draw(st.lists(st.sampled_from(groups), max_size=3, unique=True))
    own = draw(edges_of(options)) if draw(st.booleans()) else ()
    return table(losses), rows, own, [tied] if len(tied) > 1 else []


def total(values: Values, edges: Iterable[Edge], choice: Choice) -> Fraction:
    own = (exact(values[group][name]) for group, name in choice.items())
    return sum(own, Fraction(0)) + sum((exact(edge.cost(choice)) for edge in edges), Fraction(0))


def is_met(row: Row, choice: Choice) -> bool:
    numbers = [value for entries in row.table.values() for value in entries.values()]
    for edge in row.edges:
        numbers += [value for entries in edge.costs.values() for value in entries.values()]
    whole = all(isinstance(value, int) for value in numbers)
    return total(row.table, row.edges, choice) <= allowance(row.limit, whole=whole)


def every_choice(values: Values, ties: Iterable[Iterable[str]]) -> list[Choice]:
    every = (
        dict(zip(values, names, strict=True))
        for names in itertools.product(*(row for row in values.values()))
    )
    return [c for c in every if all(len({c[group] for group in tie}) == 1 for tie in ties)]


@pytest.mark.parametrize("solver", ["cbc", "highs"])
@settings(max_examples=50, deadline=None)
@given(case=cases())
def test_the_optimum_is_that_of_enumeration(solver: str, case: Any) -> None:
    values, rows, edges, ties = case
    fitting = [
        choice for choice in every_choice(values, ties) if all(is_met(r, choice) for r in rows)
    ]
    if not fitting:
        with pytest.raises(InfeasibleBudgetError):
            solve_with_edges(values, rows, edges=edges, ties=ties, solver=solver)
        return
    best = min(total(values, edges, choice) for choice in fitting)
    found = solve_with_edges(values, rows, edges=edges, ties=ties, solver=solver)
    assert all(is_met(row, found.choices) for row in rows)
    assert all(len({found.choices[group] for group in tie}) == 1 for tie in ties)
    assert found.objective == pytest.approx(float(total(values, edges, found.choices)), abs=1e-12)
    assert found.objective == pytest.approx(float(best), rel=1e-8, abs=1e-12)
    assert (found.status, found.gap, found.bound) == ("optimal", 0.0, found.objective)


@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_without_edges_it_is_the_plain_program(case: Any) -> None:
    values, rows, _, ties = case
    plain = [Row(row.table, row.limit) for row in rows]
    try:
        expected = solve_program(values, plain, ties=ties)
    except InfeasibleBudgetError:
        with pytest.raises(InfeasibleBudgetError):
            solve_with_edges(values, plain, ties=ties)
        return
    found = solve_with_edges(values, plain, ties=ties)
    rows_found = solve_rows(values, plain, ties=ties)
    for solution in (found, rows_found):
        assert (solution.choices, solution.objective) == (expected.choices, expected.objective)
        assert (solution.bound, solution.status) == (expected.bound, expected.status)


def test_edges_that_cost_nothing_change_no_choice() -> None:
    free = Edge("a", "b", {name: dict.fromkeys(NAMES, 0) for name in NAMES})
    values = {g: {name: 4.0**-i for i, name in enumerate(NAMES)} for g in "abc"}
    size = {g: dict(zip(NAMES, (2, 4, 8, 32), strict=True)) for g in "abc"}
    expected = solve_program(values, [Row(size, 15)])
    found = solve_with_edges(values, [Row(size, 15, (free,))])
    assert found.choices == expected.choices


CHANGE = {"w8a8": {"w8a8": 0, "fp32": 2}, "fp32": {"w8a8": 2, "fp32": 0}}
PAIR = {group: {"w8a8": 1.0, "fp32": 0.0} for group in ("a", "b")}
TIMES = {group: {"w8a8": 1, "fp32": 3} for group in PAIR}


def test_an_edge_between_tied_groups_is_a_cost_of_both() -> None:
    change = {"w8a8": {"w8a8": 4, "fp32": 9}, "fp32": {"w8a8": 9, "fp32": 1}}
    edges = (Edge("a", "b", change),)
    found = solve_with_edges(TIMES, [], edges=edges, ties=[("a", "b")])
    assert (found.choices, found.objective) == ({"a": "w8a8", "b": "w8a8"}, 6)
    dear = {"w8a8": {"w8a8": 6, "fp32": 0}, "fp32": {"w8a8": 0, "fp32": 1}}
    tied = solve_with_edges(TIMES, [], edges=(Edge("a", "b", dear),), ties=[("a", "b")])
    assert (tied.choices["a"], tied.objective) == ("fp32", 7)
    free = solve_with_edges(TIMES, [], edges=(Edge("a", "b", dear),))
    assert free.objective == 4


def test_several_edges_between_two_groups_add_up_whichever_way_they_go() -> None:
    both = (Edge("a", "b", CHANGE), Edge("b", "a", CHANGE), Edge("a", "b", CHANGE))
    program = PairedProgram.of(PAIR, [Row(TIMES, 9, both)])
    (pair,) = program.paired.pairs
    assert sorted(pair.entries.values()) == [(0, 0), (0, 0), (0, 6), (0, 6)]
    for limit, loss in ((6, 0.0), (5, 2.0), (2, 2.0)):
        assert solve_with_edges(PAIR, [Row(TIMES, limit, both)]).objective == loss
    assert solve_with_edges(PAIR, [Row(TIMES, 6, both[:1])]).objective == 0.0
    assert solve_with_edges(PAIR, [Row(TIMES, 10, both)]).objective == 0.0


def test_a_limit_that_equals_a_sum_of_decimals_is_met_by_it() -> None:
    tenth = {"w8a8": {"w8a8": 0, "fp32": 0.1}, "fp32": {"w8a8": 0.1, "fp32": 0}}
    times = {group: {"w8a8": 0.1, "fp32": 0.3} for group in PAIR}
    rows = [Row(times, 0.5, (Edge("a", "b", tenth),))]
    assert solve_with_edges(PAIR, rows).objective == 1.0
    below = [Row(times, math.nextafter(0.5, 0) - 1e-14, rows[0].edges)]
    assert solve_with_edges(PAIR, below).objective == 2.0


@pytest.mark.parametrize("limit", [math.inf, -math.inf])
def test_infinite_limits_bind_nothing_or_all(limit: float) -> None:
    rows = [Row(TIMES, limit, (Edge("a", "b", CHANGE),))]
    if limit > 0:
        assert solve_with_edges(PAIR, rows).objective == 0.0
        return
    with pytest.raises(InfeasibleBudgetError, match="no choice is within all limits"):
        solve_with_edges(PAIR, rows)


def test_bad_edges_and_names_are_refused() -> None:
    edge = Edge("a", "b", CHANGE)
    with pytest.raises(FxmpqError, match="no solver 'scip'"):
        solve_with_edges(PAIR, [], edges=[edge], solver="scip")
    with pytest.raises(FxmpqError, match="the edge 'a' to 'c' of the objective at w8a8 names no"):
        solve_with_edges(PAIR, [], edges=[Edge("a", "c", CHANGE)])
    short = Edge("a", "b", {"w8a8": CHANGE["w8a8"]})
    with pytest.raises(FxmpqError, match="of a limit must give a cost for every precision of 'a'"):
        solve_with_edges(PAIR, [Row(TIMES, 4, (short,))])
    with pytest.raises(FxmpqError, match="a limit lacks group 'b'"):
        solve_with_edges(PAIR, [Row({"a": TIMES["a"]}, 4, (edge,))])
    with pytest.raises(FxmpqError, match="names 'c', which is no group"):
        solve_with_edges(PAIR, [Row(TIMES, 4, (edge,))], ties=[("a", "c")])
    with pytest.raises(FxmpqError, match="a limit has 1 edges.*ask for program='ilp'"):
        solve_program(PAIR, [Row(TIMES, 4, (edge,))])


def chain(groups: int) -> tuple[Values, Row]:
    names = [f"g{index:02}" for index in range(groups)]
    values = {g: {"w8a8": 2.0 ** -(7 * i % 11), "fp32": 0.0} for i, g in enumerate(names)}
    times = {g: {"w8a8": 10 + i % 3, "fp32": 30 + 5 * i % 7} for i, g in enumerate(names)}
    edges = tuple(Edge(one, other, CHANGE) for one, other in itertools.pairwise(names))
    return values, Row(times, 19 * groups, edges)


def test_a_gap_that_is_allowed_is_proven() -> None:
    values, row = chain(16)
    best = solve_with_edges(values, [row])
    found = solve_with_edges(values, [row], max_gap=0.3)
    assert best.gap == 0.0
    assert found.gap <= 0.3
    assert found.bound <= best.objective * (1 + 1e-9)
    assert best.objective <= found.objective


def test_no_time_is_an_error_that_says_so() -> None:
    values, row = chain(16)
    with pytest.raises(BudgetError, match="found no choice within all limits in 0 s"):
        solve_with_edges(values, [row], time_limit=0.0)
