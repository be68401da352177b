from __future__ import annotations

import itertools
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxmpq.costs.terms import Edge, Moment
from fxmpq.errors import BudgetError, InfeasibleBudgetError
from fxmpq.solver import peaks as module
from fxmpq.solver.exact import allowance, exact, within
from fxmpq.solver.peaks import Peak, minimize_peak, peak_rows
from fxmpq.solver.program import Row

NAMES = ("w2a8", "w4a8", "w8a8", "fp32")
Values = dict[str, dict[str, Any]]
sizes = st.sampled_from(
    [st.integers(0, 9), st.integers(0, 10**9), st.sampled_from([0.1, 0.2, 0.3])]
)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Values, list[Moment]]:
    groups = [f"g{index}" for index in range(draw(st.integers(1, 5)))]
    options = {group: NAMES[draw(st.integers(0, 2)) :] for group in groups}
    number = draw(sizes)
    moments = [
        Moment(
            f"n{index}",
            draw(number),
            {group: {name: draw(number) for name in options[group]} for group in alive},
        )
        for index, alive in enumerate(
            draw(
                st.lists(
                    st.lists(st.sampled_from(groups), max_size=3, unique=True),
                    min_size=1,
                    max_size=5,
                )
            )
        )
    ]
    loss = draw(st.sampled_from([st.integers(0, 6), st.floats(1e-9, 1)]))
    return {g: {name: draw(loss) for name in options[g]} for g in groups}, moments


def every(values: Values) -> list[dict[str, str]]:
    return [dict(zip(values, names, strict=True)) for names in itertools.product(*values.values())]


def peak_of(moments: list[Moment], choices: dict[str, str]) -> Fraction:
    return max(
        exact(moment.fixed)
        + sum((exact(row[choices[g]]) for g, row in moment.rows.items()), Fraction(0))
        for moment in moments
    )


def loss_of(values: Values, choices: dict[str, str]) -> Fraction:
    return sum((exact(values[group][name]) for group, name in choices.items()), Fraction(0))


@given(cases(), st.floats(0, 1.1), st.booleans())
def test_the_rows_are_the_limit(
    case: tuple[Values, list[Moment]], share: float, at_a_total: bool
) -> None:
    values, moments = case
    totals = sorted(float(peak_of(moments, choices)) for choices in every(values))
    limit = totals[len(totals) // 2] if at_a_total else share * totals[-1]
    rows = peak_rows(moments, limit, values)
    whole = Peak.of(moments).whole
    for choices in every(values):
        kept = all(loss_of(dict(row.table), choices) <= row.limit for row in rows)
        assert kept == (peak_of(moments, choices) <= allowance(limit, whole=whole))
    assert len(rows) <= len(moments)


@given(cases())
def test_totals_and_bounds_are_those_of_the_moments(case: tuple[Values, list[Moment]]) -> None:
    values, moments = case
    peak = Peak.of(moments)
    found = [Fraction(peak.total(choices), peak.factor) for choices in every(values)]
    assert found == [peak_of(moments, choices) for choices in every(values)]
    assert Fraction(peak.smallest(), peak.factor) <= min(found)


@given(cases())
def test_the_sums_hold_every_peak(case: tuple[Values, list[Moment]]) -> None:
    values, moments = case
    peak = Peak.of(moments)
    found = {peak.total(choices) for choices in every(values)}
    sums = peak.sums(peak.smallest(), max(found))
    assert found <= set(sums)
    assert list(sums) == sorted(set(sums))
    assert sums[0] == peak.smallest()


def test_too_many_sums_are_not_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_SUMS", 3)
    values, moments = spread()
    best = minimize_peak(moments, values, 10.0)
    assert Peak.of(moments).sums(5, 9) == range(5, 10)
    assert (best.objective, best.status) == (4 * 100 + 4 * 401, "optimal")


def test_moments_that_never_exceed_another_need_no_limit() -> None:
    row = {"w8a8": 10, "fp32": 40}
    shape = {"a": row, "b": row}
    moments = [
        Moment("small", 0, {"a": row}),
        Moment("large", 5, {"a": row, "b": row}),
        # The first exceeds it at a's codes, though it is less in float.
        Moment("other", 0, {"b": {"w8a8": 12, "fp32": 60}}),
        Moment("same", 5, {"b": row, "a": row}),
        Moment("low", 1, {}),
    ]
    rows = peak_rows(moments, 20, shape)
    assert rows == [
        Row({"a": row, "b": row}, 15),
        Row({"a": dict.fromkeys(row, 0), "b": {"w8a8": 12, "fp32": 60}}, 20),
    ]
    assert peak_rows(moments, 85, shape) == []


@settings(max_examples=80, deadline=None)
@given(cases(), st.floats(0, 1), st.booleans(), st.data())
def test_the_least_peak_is_that_of_enumeration(
    case: tuple[Values, list[Moment]], share: float, tied: bool, data: st.DataObject
) -> None:
    values, moments = case
    ends = [next(iter(values)), next(reversed(values))]
    ties = [ends] if tied and values[ends[0]].keys() == values[ends[1]].keys() else []
    choices = [c for c in every(values) if not ties or c[ends[0]] == c[ends[1]]]
    losses = sorted(float(loss_of(values, found)) for found in choices)
    most = losses[0] + share * (losses[-1] - losses[0])
    other = {g: {name: data.draw(st.integers(0, 9)) for name in row} for g, row in values.items()}
    row = Row(other, data.draw(st.integers(0, 40)))
    fitting = [
        found
        for found in choices
        if within(float(loss_of(values, found)), most) and loss_of(other, found) <= row.limit
    ]
    if not fitting:
        with pytest.raises(InfeasibleBudgetError):
            minimize_peak(moments, values, most, [row], ties=ties)
        return
    found = minimize_peak(moments, values, most, [row], ties=ties)
    least = min(peak_of(moments, choice) for choice in fitting)
    assert peak_of(moments, found.choices) == least
    assert (found.objective, found.bound, found.status) == (float(least), float(least), "optimal")
    # Of those of the least peak, one of the least loss.
    lost = min(loss_of(values, c) for c in fitting if peak_of(moments, c) == least)
    assert float(loss_of(values, found.choices)) == pytest.approx(float(lost), rel=1e-8)


def test_a_further_limit_may_have_edges() -> None:
    row = {"w8a8": 10, "fp32": 40}
    values = {group: {"w8a8": 1.0, "fp32": 0.0} for group in ("a", "b")}
    moments = [Moment("n", 0, {"a": row}), Moment("m", 0, {"b": row})]
    change = {"w8a8": {"w8a8": 0, "fp32": 3}, "fp32": {"w8a8": 3, "fp32": 0}}
    times = {group: {"w8a8": 1, "fp32": 2} for group in values}
    edges = (Edge("a", "b", change),)
    # One in float would do for the loss, but changing formats takes too long.
    assert minimize_peak(moments, values, 1.0, [Row(times, 4, edges)]).objective == 40
    assert minimize_peak(moments, values, 2.0, [Row(times, 4, edges)]).objective == 10
    with pytest.raises(InfeasibleBudgetError):
        minimize_peak(moments, values, 1.0, [Row(times, 3, edges)])


def spread() -> tuple[Values, list[Moment]]:
    row = {"w8a8": 100, "fp32": 401}
    groups = [f"g{index}" for index in range(8)]
    moments = [Moment(group, index, {group: row}) for index, group in enumerate(groups)]
    moments.append(Moment("all", 0, dict.fromkeys(groups, row)))
    return {g: {"w8a8": float(i + 1), "fp32": 0.0} for i, g in enumerate(groups)}, moments


def test_a_gap_that_is_allowed_ends_the_search() -> None:
    values, moments = spread()
    best = minimize_peak(moments, values, 10.0)
    found = minimize_peak(moments, values, 10.0, max_gap=0.9)
    assert (best.objective, best.status, best.gap) == (4 * 100 + 4 * 401, "optimal", 0.0)
    assert found.status == "feasible"
    assert found.bound <= best.objective <= found.objective
    assert found.gap <= 0.9


def test_time_that_runs_out_leaves_the_best_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    values, moments = spread()
    genuine, calls = module.solve_rows, []

    def late(*args: Any, **options: Any) -> Any:
        calls.append(options)
        if len(calls) > 2:
            raise BudgetError("no time is left")
        return genuine(*args, **options)

    monkeypatch.setattr(module, "solve_rows", late)
    found = minimize_peak(moments, values, 10.0)
    assert (found.status, len(calls)) == ("feasible", 3)
    assert found.bound < found.objective
    with pytest.raises(BudgetError, match="no time is left"):
        minimize_peak(moments, values, 10.0)
