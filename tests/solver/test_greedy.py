from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxmpq.costs.table import CostTable
from fxmpq.costs.terms import Edge, Moment
from fxmpq.errors import BudgetError, FxmpqError, InfeasibleBudgetError
from fxmpq.sensitivity.sensitivity import Sensitivity
from fxmpq.solver.flip_search import flip_curve, flipped
from fxmpq.solver.greedy import Flip, baseline, flips, greedy, lowering
from fxmpq.solver.program import Row, Solution, solve_program

NAMES = ("w8a8", "w4a8", "w2a8", "w8a4", "w3a4")
Values = dict[str, dict[str, float]]
Tables = tuple[Values, Values]

losses = st.one_of(st.integers(0, 4).map(float), st.floats(0, 3))
# Sums of thousandths as floats are apart by more than their rounding, so a test can compare them.
thousandths = st.integers(0, 4000).map(lambda number: number / 1000)
usages = st.sampled_from([st.integers(0, 6), st.integers(0, 10**9), thousandths])


@st.composite
def tables(draw: st.DrawFn, metrics: int = 1) -> tuple[Values, ...]:
    """Losses and costs of a few groups with one to five precisions."""
    groups = [f"g{index}" for index in range(draw(st.integers(1, 5)))]
    options = {group: NAMES[: draw(st.integers(1, 5))] for group in groups}

    def table(entry: st.SearchStrategy[float]) -> Values:
        return {group: {name: draw(entry) for name in options[group]} for group in groups}

    return table(losses), *(table(draw(usages)) for _ in range(metrics))


def total(table: Values, choice: dict[str, str]) -> float:
    return math.fsum(table[group][name] for group, name in choice.items())


def attempt(values: Values, table: CostTable, rows: list[Row]) -> Solution | str:
    """The solution, or what the error says."""
    try:
        return greedy(Sensitivity(values), table, rows)
    except BudgetError as error:
        return str(error)


def test_flips_are_sorted_by_loss_then_bits_then_saving_then_order() -> None:
    values = {
        "a": {"w8a8": 0.0, "w4a8": 0.2, "w8a4": 0.1},
        "b": {"w8a8": 0.0, "w4a8": 0.1, "w2a8": 0.1},
        "c": {"w8a8": 0.0, "w4a8": 0.1},
        "d": {"w8a8": 0.0, "w4a8": 0.1},
    }
    bops: Values = {
        "a": {"w8a8": 64, "w4a8": 32, "w8a4": 32},
        "b": {"w8a8": 64, "w4a8": 32, "w2a8": 16},
        "c": {"w8a8": 640, "w4a8": 320},
        "d": {"w8a8": 64, "w4a8": 32},
    }
    found = flips(Sensitivity(values), CostTable({"bops": bops}), "bops")
    assert found == [
        Flip(("c",), "w4a8", 0.1, 12, 320),
        Flip(("a",), "w8a4", 0.1, 12, 32),
        Flip(("b",), "w4a8", 0.1, 12, 32),
        Flip(("d",), "w4a8", 0.1, 12, 32),
        Flip(("b",), "w2a8", 0.1, 10, 48),
        Flip(("a",), "w4a8", 0.2, 12, 32),
    ]


def test_the_baseline_is_the_most_expensive_then_of_most_bits_then_least_harmful() -> None:
    values = {
        "a": {"w4a8": 0.0, "w8a8": 0.1, "w8a4": 0.0},
        "b": {"w8a4": 0.2, "w4a8": 0.1, "w2a8": 0.0},
        "c": {"w4": 0.0, "fp32": 0.0},
    }
    size: Values = {
        "a": {"w4a8": 4, "w8a8": 8, "w8a4": 8},
        "b": {"w8a4": 8, "w4a8": 8, "w2a8": 2},
        "c": {"w4": 4, "fp32": 32},
    }
    found = baseline(Sensitivity(values), CostTable({"weights": size}), "weights")
    assert found == {"a": "w8a8", "b": "w4a8", "c": "fp32"}


def test_tied_groups_flip_together_with_summed_loss_and_saving() -> None:
    values = {"a": {"w8a8": 0.0, "w4a8": 0.1}, "b": {"w8a8": 0.0, "w4a8": 0.3, "w2a8": 1.0}}
    size: Values = {"a": {"w8a8": 8, "w4a8": 4}, "b": {"w8a8": 80, "w4a8": 40, "w2a8": 20}}
    table = CostTable({"weights": size})
    assert flips(Sensitivity(values), table, "weights", ties=[["b", "a"]]) == [
        Flip(("a", "b"), "w4a8", 0.4, 12, 44)
    ]
    found = greedy(Sensitivity(values), table, [Row(size, 87)], ties=[["a", "b"]])
    assert found.choices == {"a": "w4a8", "b": "w4a8"}


@settings(max_examples=200, deadline=None)
@given(
    found=tables(),
    share=st.integers(-5, 105).map(lambda percent: percent / 100),
    monotone=st.booleans(),
)
def test_with_one_limit_it_is_the_first_point_of_the_curve_within(
    found: Tables, share: float, monotone: bool
) -> None:
    values, size = found
    sensitivity, table = Sensitivity(values), CostTable({"cost": size})
    low, high = table.smallest("cost"), table.largest("cost")
    limit = low + share * (high - low)
    curve = flip_curve(sensitivity, table, "cost", monotone=monotone)
    within = [point for point in curve if point.cost <= limit * (1 + 2.0**-50)]
    if not within:
        with pytest.raises(BudgetError) as caught:
            greedy(sensitivity, table, [Row(size, limit)], monotone=monotone)
        assert isinstance(caught.value, InfeasibleBudgetError) == (low > limit * (1 + 2.0**-50))
        return
    answer = greedy(sensitivity, table, [Row(size, limit)], monotone=monotone)
    kept = flips(sensitivity, table, "cost")
    kept = lowering(kept) if monotone else kept
    start = baseline(sensitivity, table, "cost")
    assert answer.choices == flipped(start, kept[: within[0].count])
    assert answer.objective == pytest.approx(within[0].loss, rel=1e-12, abs=1e-300)


@settings(max_examples=150, deadline=None)
@given(found=tables(metrics=2), shares=st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_with_several_limits_the_choice_is_within_all_and_above_a_valid_bound(
    found: tuple[Values, ...], shares: tuple[float, float]
) -> None:
    values, *sizes = found
    table = CostTable({f"cost{index}": size for index, size in enumerate(sizes)})
    rows = []
    for metric, size, share in zip(table.metrics, sizes, shares, strict=True):
        low, high = table.smallest(metric), table.largest(metric)
        rows.append(Row(size, low + share * (high - low)))
    answer = attempt(values, table, rows)
    try:
        best = solve_program(values, rows).objective
    except InfeasibleBudgetError:
        assert answer == "no choice is within all limits"
        return
    if isinstance(answer, str):
        assert answer.startswith("the flips end outside the limits, though some choice is within")
        return
    for row in rows:
        assert total(row.table, answer.choices) <= row.limit * (1 + 2.0**-49)
    assert answer.objective == total(values, answer.choices)
    assert answer.bound <= best * (1 + 1e-12) + 1e-15
    assert best <= answer.objective * (1 + 1e-12) + 1e-15
    assert answer.status == "feasible" or answer.bound == answer.objective == best


def test_flips_that_lower_no_exceeded_limit_are_skipped() -> None:
    values = {
        "a": {"w8a8": 0.0, "w4a8": 0.1, "w8a4": 0.01},
        "b": {"w8a8": 0.0, "w4a8": 0.2, "w8a4": 0.02},
    }
    weights: Values = {group: {"w8a8": 8, "w4a8": 4, "w8a4": 8} for group in values}
    bops: Values = {group: {"w8a8": 64, "w4a8": 32, "w8a4": 32} for group in values}
    table = CostTable({"weights": weights, "bops": bops})
    # Only weights are exceeded: fewer bits of activations, though less harmful, do not help.
    rows = [Row(weights, 12), Row(bops, 128)]
    assert greedy(Sensitivity(values), table, rows).choices == {"a": "w4a8", "b": "w8a8"}
    # Only BOPs are exceeded: they are the least harmful now.
    rows = [Row(weights, 16), Row(bops, 96)]
    assert greedy(Sensitivity(values), table, rows).choices == {"a": "w8a4", "b": "w8a8"}


def test_a_flip_skipped_at_first_is_taken_when_it_helps_later() -> None:
    """Flip b lowers the first cost and raises the second as much, until flip a has made room."""
    values = {"b": {"w8a8": 0.0, "w4a8": 0.1}, "a": {"w8a8": 0.0, "w4a8": 0.2}}
    first: Values = {"b": {"w8a8": 8, "w4a8": 4}, "a": {"w8a8": 8, "w4a8": 8}}
    second: Values = {"b": {"w8a8": 4, "w4a8": 8}, "a": {"w8a8": 10, "w4a8": 4}}
    table = CostTable({"first": first, "second": second})
    rows = [Row(first, 12), Row(second, 12)]
    found = greedy(Sensitivity(values), table, rows)
    assert found.choices == {"b": "w4a8", "a": "w4a8"}


def test_the_published_walk_lets_a_later_flip_overwrite_an_earlier_one() -> None:
    values = {"a": {"w8a8": 0.0, "w2a8": 0.1, "w4a8": 0.2}, "b": {"w8a8": 0.0, "w4a8": 0.3}}
    size: Values = {"a": {"w8a8": 8, "w2a8": 2, "w4a8": 4}, "b": {"w8a8": 8, "w4a8": 4}}
    table, sensitivity = CostTable({"weights": size}), Sensitivity(values)
    kept = greedy(sensitivity, table, [Row(size, 8)])
    assert kept.choices == {"a": "w2a8", "b": "w4a8"}
    published = greedy(sensitivity, table, [Row(size, 8)], monotone=False)
    assert published.choices == {"a": "w4a8", "b": "w4a8"}
    with pytest.raises(BudgetError, match="end outside .*program='ilp', or for monotone=True"):
        greedy(sensitivity, table, [Row(size, 6)], monotone=False)
    assert greedy(sensitivity, table, [Row(size, 6)]).choices == {"a": "w2a8", "b": "w4a8"}


def test_flips_that_cannot_reach_a_choice_say_so() -> None:
    """Either flip alone exceeds one limit by more than it saves of the other."""
    values = {group: {"w8a8": 0.0, "w4a8": 0.1} for group in "ab"}
    first: Values = {"a": {"w8a8": 6, "w4a8": 0}, "b": {"w8a8": 6, "w4a8": 10}}
    second: Values = {"a": {"w8a8": 6, "w4a8": 10}, "b": {"w8a8": 6, "w4a8": 0}}
    table = CostTable({"first": first, "second": second})
    rows = [Row(first, 10), Row(second, 10)]
    assert set(solve_program(values, rows).choices.values()) == {"w4a8"}
    with pytest.raises(BudgetError, match="though some choice is within; ask for program='ilp'$"):
        greedy(Sensitivity(values), table, rows)


def test_a_met_limit_keeps_the_baseline_and_no_limit_too() -> None:
    values = {"a": {"w8a8": 0.0, "w4a8": 0.5}}
    size: Values = {"a": {"w8a8": 8, "w4a8": 4}}
    for rows in ([Row(size, 8)], [Row(size, math.inf)], []):
        found = greedy(Sensitivity(values), CostTable({"weights": size}), rows)
        assert (found.choices, found.status, found.gap) == ({"a": "w8a8"}, "optimal", 0.0)


def test_the_bound_is_that_of_the_linear_program() -> None:
    values = {f"g{n}": {"w8a8": 0.0, "w4a8": loss} for n, loss in enumerate((1.0, 2.0, 3.5, 4.0))}
    size: Values = {group: {"w8a8": 7 + index, "w4a8": 1} for index, group in enumerate(values)}
    found = greedy(Sensitivity(values), CostTable({"weights": size}), [Row(size, 21)])
    # 34 at the start: 13 to save, where flips save 6, 7, 8 and 9 for 1, 2, 3.5 and 4.
    assert found.choices == {"g0": "w4a8", "g1": "w4a8", "g2": "w8a8", "g3": "w8a8"}
    assert (found.objective, found.bound, found.status) == (3.0, 3.0, "optimal")
    tighter = greedy(Sensitivity(values), CostTable({"weights": size}), [Row(size, 20)])
    assert tighter.objective == 6.5
    assert tighter.bound == pytest.approx(3 + 3.5 / 8, rel=1e-9)
    assert tighter.status == "feasible"


def test_losses_that_differ_by_more_than_a_float_holds() -> None:
    values = {"a": {"w8a8": 5e-324, "w4a8": 1.0, "w2a8": 0.5}, "b": {"w8a8": 0.0, "w4a8": 5e-324}}
    size: Values = {"a": {"w8a8": 4, "w4a8": 1, "w2a8": 2}, "b": {"w8a8": 3, "w4a8": 2}}
    found = greedy(Sensitivity(values), CostTable({"weights": size}), [Row(size, 6)])
    assert found.choices == {"a": "w8a8", "b": "w4a8"}
    assert 0.0 <= found.bound <= found.objective == 1e-323


def test_bad_requests_are_refused() -> None:
    values, size = {"a": {"w8a8": 0.0, "w4a8": 0.5}}, {"a": {"w8a8": 8.0, "w4a8": 4.0}}
    sensitivity, table = Sensitivity(values), CostTable({"weights": size})
    with pytest.raises(FxmpqError, match="no cost 'weight' to save; there are 'weights'"):
        flips(sensitivity, table, "weight")
    with pytest.raises(FxmpqError, match="no cost 'bops' to save"):
        baseline(sensitivity, table, "bops")
    with pytest.raises(FxmpqError, match="names 'b', which is no group"):
        flips(sensitivity, table, "weights", ties=[["a", "b"]])
    with pytest.raises(FxmpqError, match="no solver 'scip'"):
        greedy(sensitivity, table, [Row(size, 4)], solver="scip")
    with pytest.raises(InfeasibleBudgetError, match="no choice is within all limits"):
        greedy(sensitivity, table, [Row(size, 3)])


def test_costs_that_are_no_sum_over_groups_have_no_flips() -> None:
    values = {group: {"w8a8": 0.0, "w4a8": 0.5} for group in "ab"}
    size: Values = {group: {"w8a8": 8, "w4a8": 4} for group in "ab"}
    change = {"w8a8": {"w8a8": 0, "w4a8": 1}, "w4a8": {"w8a8": 1, "w4a8": 0}}
    edges, moments = {"us": [Edge("a", "b", change)]}, {"peak": [Moment("n", 0, size)]}
    table = CostTable({"us": size, "weights": size}, edges=edges, moments=moments)  # type: ignore[arg-type]
    for find in (flips, baseline):
        with pytest.raises(FxmpqError, match="'us' is no sum over groups alone: 1 edges"):
            find(Sensitivity(values), table, "us")
        with pytest.raises(FxmpqError, match="'peak' is a peak"):
            find(Sensitivity(values), table, "peak")
        assert len(find(Sensitivity(values), table, "weights")) == 2


def test_torch_keeps_its_threads() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        values = {name: {"w2a8": 3.0, "w4a8": 1.0, "w8a8": 0.0} for name in "abc"}
        size: Values = {name: {"w2a8": 2, "w4a8": 4, "w8a8": 8} for name in "abc"}
        rows = [Row(size, 13), Row(values, 7.5)]
        greedy(Sensitivity(values), CostTable({"weights": size}), rows)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
