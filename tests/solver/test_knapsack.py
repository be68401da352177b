from __future__ import annotations

import itertools
import math
import time
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxmpq.costs.table import CostTable
from fxmpq.errors import FxmpqError, InfeasibleBudgetError
from fxmpq.sensitivity.sensitivity import Sensitivity
from fxmpq.solver import knapsack as knapsack_module
from fxmpq.solver.exact import exact
from fxmpq.solver.forms import integer_program, integer_value, named_solution
from fxmpq.solver.knapsack import knapsack
from fxmpq.solver.program import Row, Solution, solve_program

LOW, HIGH = "w2a4", "w4a4"
Values = dict[str, dict[str, float]]
Instance = tuple[Values, Values, float, list[list[str]]]

gains = st.one_of(st.integers(-2, 9).map(float), st.floats(0, 4), st.floats(1e-12, 1e-9))
prices = st.sampled_from([st.integers(0, 12), st.integers(1, 10**9), st.floats(0, 3)])


@st.composite
def instances(draw: st.DrawFn) -> Instance:
    """Two precisions a group, some with one; gains, costs and limits of every kind."""
    groups = [f"g{index}" for index in range(draw(st.integers(1, 7)))]
    price = draw(prices)
    losses: Values = {}
    sizes: Values = {}
    for group in groups:
        names = draw(st.sampled_from([(LOW, HIGH), (LOW, HIGH), (LOW, HIGH), (HIGH,)]))
        least = draw(price)
        sizes[group] = {name: least + place * draw(price) for place, name in enumerate(names)}
        losses[group] = {name: (1 - place) * draw(gains) for place, name in enumerate(names)}
    low = math.fsum(min(row.values()) for row in sizes.values())
    high = math.fsum(max(row.values()) for row in sizes.values())
    limit = low + draw(st.floats(-0.1, 1.1)) * (high - low)
    two = [group for group in groups if len(sizes[group]) == 2]
    member = st.sampled_from(two or groups)
    ties = draw(st.just([]) | st.lists(st.lists(member, max_size=3), max_size=2))
    return losses, sizes, limit, ties


def run(instance: Instance, **options: float) -> Solution:
    losses, sizes, limit, ties = instance
    table = CostTable({"size": sizes})
    return knapsack(Sensitivity(losses), table, [Row(sizes, limit)], ties=ties, **options)


def optimum(instance: Instance) -> float:
    losses, sizes, limit, ties = instance
    best = math.inf
    for names in itertools.product(*losses.values()):
        choice = dict(zip(losses, names, strict=True))
        if any(len({choice[group] for group in tie}) > 1 for tie in ties):
            continue
        used = sum(exact(sizes[group][name]) for group, name in choice.items())
        if used <= exact(limit) * (1 + exact(2.0**-50)):
            best = min(best, total(losses, choice))
    return best


def total(table: Values, choice: dict[str, str]) -> float:
    return math.fsum(table[group][name] for group, name in choice.items())


@settings(max_examples=300, deadline=None)
@given(instance=instances())
def test_it_is_the_optimum_of_enumeration_and_of_the_integer_program(instance: Instance) -> None:
    losses, sizes, limit, ties = instance
    expected = optimum(instance)
    if expected == math.inf:
        with pytest.raises(InfeasibleBudgetError, match="no choice is within all limits"):
            run(instance)
        return
    found = run(instance)
    assert found.objective == pytest.approx(expected, rel=1e-12, abs=1e-24)
    assert found.objective == total(losses, found.choices)
    assert (found.status, found.gap) == ("optimal", 0.0)
    assert list(found.choices) == list(losses)
    assert all(len({found.choices[group] for group in tie}) <= 1 for tie in ties)
    other = solve_program(losses, [Row(sizes, limit)], ties=ties)
    assert other.objective == pytest.approx(expected, rel=1e-12, abs=1e-24)


def drawn(count: int, seed: int, *, alike: bool = False) -> Instance:
    """Groups with 4-bit codes whose entropy is the gain; or all gains in proportion to costs."""
    generator = np.random.default_rng(seed)
    macs = generator.integers(10**4, 10**7, count).tolist()
    entropies = generator.uniform(1.5, 4.0, count).tolist()
    if alike:
        entropies = [cost / 10**7 for cost in macs]
    losses = {f"g{n}": {LOW: gain, HIGH: 0.0} for n, gain in enumerate(entropies)}
    bops: Values = {f"g{n}": {LOW: 8 * cost, HIGH: 16 * cost} for n, cost in enumerate(macs)}
    limit = int(0.78 * sum(row[HIGH] for row in bops.values()))
    return losses, bops, limit, []


@pytest.mark.parametrize("seed", range(3))
def test_two_hundred_groups_agree_with_the_integer_program(seed: int) -> None:
    instance = drawn(200, seed)
    losses, bops, limit, _ = instance
    found = run(instance)
    assert found.status == "optimal"
    expected = solve_program(losses, [Row(bops, limit)])
    assert found.objective == pytest.approx(expected.objective, rel=1e-12)
    assert total(bops, found.choices) <= limit


def test_the_table_of_the_usual_dynamic_program_agrees() -> None:
    generator = np.random.default_rng(4)
    worth, weight = generator.integers(1, 50, 30), generator.integers(1, 40, 30)
    capacity = 250
    best = np.zeros(capacity + 1, dtype=int)
    for gain, cost in zip(worth, weight, strict=True):
        best[cost:] = np.maximum(best[cost:], best[:-cost] + gain)
    losses = {f"g{n}": {LOW: float(gain), HIGH: 0.0} for n, gain in enumerate(worth)}
    sizes: Values = {f"g{n}": {LOW: 0, HIGH: int(cost)} for n, cost in enumerate(weight)}
    found = run((losses, sizes, capacity, []))
    assert found.objective == worth.sum() - best[-1]


def test_linked_groups_are_one_item_of_summed_gain_and_cost() -> None:
    losses = {"a": {LOW: 3.0, HIGH: 0.0}, "b": {LOW: 2.0, HIGH: 0.0}, "c": {LOW: 2.0, HIGH: 0.0}}
    sizes: Values = {group: {LOW: 2, HIGH: 4} for group in losses}
    alone = run((losses, sizes, 10, []))
    assert alone.choices in ({"a": HIGH, "b": HIGH, "c": LOW}, {"a": HIGH, "b": LOW, "c": HIGH})
    linked = run((losses, sizes, 10, [["b", "c"]]))
    assert linked.choices == {"a": LOW, "b": HIGH, "c": HIGH}
    assert linked.objective == 3.0


def test_costs_in_decimals_are_exact() -> None:
    losses = {"a": {LOW: 1.0, HIGH: 0.0}, "b": {LOW: 1.0, HIGH: 0.0}}
    seconds: Values = {"a": {LOW: 0, HIGH: 0.1}, "b": {LOW: 0, HIGH: 0.2}}
    assert run((losses, seconds, 0.3, [])).objective == 0.0
    assert run((losses, seconds, 0.299, [])).objective == 1.0


def test_a_limit_that_binds_nothing_and_one_that_settles_all() -> None:
    losses, sizes, _, _ = drawn(5, 0)
    top, floor = (sum(f(row.values()) for row in sizes.values()) for f in (max, min))
    assert set(run((losses, sizes, top, [])).choices.values()) == {HIGH}
    assert set(run((losses, sizes, floor, [])).choices.values()) == {LOW}
    with pytest.raises(InfeasibleBudgetError):
        run((losses, sizes, floor - 1, []))


def test_when_lists_grow_too_long_branch_and_cut_proves_it(monkeypatch: pytest.MonkeyPatch) -> None:
    instance = drawn(40, 1)
    expected = run(instance)
    monkeypatch.setattr(knapsack_module, "_MOST_STATES", 0)
    found = run(instance)
    assert found.objective == pytest.approx(expected.objective, rel=1e-12)
    assert found.status == "optimal"


def test_no_time_returns_the_best_choice_and_an_honest_bound() -> None:
    instance = drawn(40, 2, alike=True)
    losses, bops, limit, _ = instance
    found = run(instance, time_limit=0.0)
    assert found.status == "feasible"
    assert total(bops, found.choices) <= limit
    # With gains in proportion to costs, what is lost is what the limit leaves out.
    least = (sum(row[HIGH] for row in bops.values()) - limit) / 8e7
    assert found.bound == pytest.approx(least, rel=1e-7)
    assert found.bound <= found.objective == total(losses, found.choices)


@pytest.mark.parametrize("count", [0, 2])
def test_another_number_of_limits_is_refused(count: int) -> None:
    losses, sizes, limit, _ = drawn(3, 0)
    table = CostTable({"bops": sizes})
    with pytest.raises(FxmpqError, match=rf"exactly one limit, and the budget {count}, .*'ilp'"):
        knapsack(Sensitivity(losses), table, [Row(sizes, limit)] * count)


def test_three_precisions_are_refused_with_the_group() -> None:
    losses = {"a": {LOW: 1.0, HIGH: 0.0}, "b": {LOW: 1.0, HIGH: 0.5, "w8a8": 0.0}}
    sizes: Values = {"a": {LOW: 2, HIGH: 4}, "b": {LOW: 2, HIGH: 4, "w8a8": 8}}
    with pytest.raises(FxmpqError, match="group 'b' has 3: w2a4, w4a4, w8a8; .*program='ilp'"):
        run((losses, sizes, 9, []))
    tied = {"a": losses["a"], "b": losses["b"]}
    assert run((tied, sizes, 8, [["a", "b"]])).choices == {"a": HIGH, "b": HIGH}


def test_an_unknown_solver_and_a_limit_without_entries_are_refused() -> None:
    losses, sizes, limit, _ = drawn(2, 0)
    table = CostTable({"bops": sizes})
    with pytest.raises(FxmpqError, match="no solver 'scip'; there are 'cbc', 'highs'"):
        knapsack(Sensitivity(losses), table, [Row(sizes, limit)], solver="scip")
    with pytest.raises(FxmpqError, match="a limit lacks group 'g1'"):
        knapsack(Sensitivity(losses), table, [Row({"g0": sizes["g0"]}, limit)])


def test_an_endless_limit_counts_as_none_and_a_choice_is_named_in_the_order_of_the_groups() -> None:
    losses = {"a": {LOW: 0.5, HIGH: 0.0}, "b": {HIGH: 0.25}, "c": {LOW: 1.0, HIGH: 0.0}}
    sizes: Values = {"a": {LOW: 1, HIGH: 2}, "b": {HIGH: 3}, "c": {LOW: 4, HIGH: 5}}
    sensitivity = Sensitivity(losses)
    rows = [Row(sizes, math.inf), Row(sizes, 9)]
    found = knapsack(sensitivity, CostTable({"size": sizes}), rows)
    assert list(found.choices.items()) == [("a", LOW), ("b", HIGH), ("c", HIGH)]
    program = integer_program(sensitivity, rows, [["a", "c"]], "cbc")
    assert integer_value(program, {0, 2}) == 7
    named = named_solution(program, sensitivity, {0, 2}, Fraction(3), time.perf_counter())
    assert list(named.choices.items()) == [("a", LOW), ("b", HIGH), ("c", LOW)]
    assert (named.objective, named.bound, named.status) == (1.75, 0.75, "feasible")
