from __future__ import annotations

import itertools
import time
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxmpq.errors import FxmpqError, InfeasibleBudgetError
from fxmpq.sensitivity.sensitivity import Sensitivity
from fxmpq.solver.forms import (
    any_choice,
    integer_program,
    integer_value,
    lower_bound,
    named_solution,
)
from fxmpq.solver.program import Row

NAMES = ("w2a8", "w4a8", "w8a8")

numbers = st.one_of(st.integers(0, 9).map(float), st.floats(0, 1e3), st.floats(1e-12, 1e-9))


@st.composite
def cases(draw: st.DrawFn) -> tuple[Sensitivity, list[Row]]:
    groups = [f"g{index}" for index in range(draw(st.integers(1, 3)))]
    losses = {group: {name: draw(numbers) for name in NAMES} for group in groups}
    rows = []
    for _ in range(draw(st.integers(1, 2))):
        costs = {group: {name: draw(st.integers(0, 9)) for name in NAMES} for group in groups}
        rows.append(Row(costs, draw(st.integers(0, 27))))
    return Sensitivity(losses), rows


@given(cases())
def test_bounds_lie_below_and_choices_within_what_enumeration_finds(
    case: tuple[Sensitivity, list[Row]],
) -> None:
    sensitivity, rows = case
    program = integer_program(sensitivity, rows, (), "cbc")
    totals = [
        sum(sensitivity.values[group][name] for group, name in choice.items())
        for names in itertools.product(NAMES, repeat=len(sensitivity.values))
        for choice in [dict(zip(sensitivity.values, names, strict=True))]
        if all(sum(row.table[g][n] for g, n in choice.items()) <= row.limit for row in rows)
    ]
    if not totals:
        with pytest.raises(InfeasibleBudgetError):
            any_choice(program.instance, "cbc", 10)
        return
    keys = any_choice(program.instance, "cbc", 10)
    value = integer_value(program, keys)
    bound = lower_bound(program.instance, value, "cbc", 10)
    assert bound <= value
    assert float(bound / program.scale) <= min(totals) * (1 + 1e-9) + 1e-15
    found = named_solution(program, sensitivity, keys, bound, time.perf_counter())
    assert min(totals) <= found.objective * (1 + 1e-9)
    assert (found.status == "optimal") == (bound == value)
    for row in rows:
        assert sum(row.table[group][name] for group, name in found.choices.items()) <= row.limit


def test_ties_are_named_apart_again() -> None:
    table = {"a": {"w4a8": 1.0, "w8a8": 0.0}, "b": {"w4a8": 2.0, "w8a8": 0.0}}
    sensitivity = Sensitivity(table)
    program = integer_program(sensitivity, [Row(table, 100)], [("a", "b")], "cbc")
    found = named_solution(program, sensitivity, {0}, Fraction(0), time.perf_counter())
    assert found.choices == {"a": "w4a8", "b": "w4a8"}
    assert (found.objective, found.bound, found.status) == (3.0, 0.0, "feasible")


def test_an_unknown_solver_is_refused() -> None:
    with pytest.raises(FxmpqError, match="no solver 'gurobi'"):
        integer_program(Sensitivity({"a": {"w8a8": 0.0}}), [], (), "gurobi")
