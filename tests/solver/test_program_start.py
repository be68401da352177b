from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxmpq.errors import FxmpqError, InfeasibleBudgetError
from fxmpq.solver.program import IntegerProgram, Row, solve_program
from fxmpq.solver.ties import Table

NAMES = ("w2a8", "w4a8", "w8a8")


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_choice_to_start_from_leads_to_the_optimum(data: st.DataObject) -> None:
    """Also with values so small that their integers are too large for a float."""
    groups = [f"g{index}" for index in range(data.draw(st.integers(1, 4)))]
    entry = st.sampled_from([0.0, 1.0, 2.0, 3.0, 0.1, 1e-320])

    def table() -> dict[str, dict[str, float]]:
        return {group: {name: data.draw(entry) for name in NAMES} for group in groups}

    objective = table()
    rows = [Row(table(), data.draw(st.integers(0, 9))) for _ in range(data.draw(st.integers(1, 2)))]
    start = {group: data.draw(st.sampled_from(NAMES)) for group in groups}

    def total(entries: Table, names: tuple[str, ...]) -> float:
        return math.fsum(entries[g][name] for g, name in zip(groups, names, strict=True))

    fitting = [
        total(objective, names)
        for names in itertools.product(NAMES, repeat=len(groups))
        if all(total(row.table, names) <= row.limit * (1 + 2.0**-50) for row in rows)
    ]
    if not fitting:
        with pytest.raises(InfeasibleBudgetError):
            solve_program(objective, rows, start=start)
        return
    found = solve_program(objective, rows, start=start)
    assert found.objective == pytest.approx(min(fitting), rel=1e-12)
    assert (found.status, found.bound) == ("optimal", found.objective)
    chosen = tuple(found.choices.values())
    assert all(total(row.table, chosen) <= row.limit * (1 + 2.0**-50) for row in rows)


def test_a_start_that_is_no_choice_is_refused() -> None:
    losses = {group: {"w2a8": 1.0, "w8a8": 0.0} for group in "ab"}
    rows = [Row({group: {"w2a8": 2, "w8a8": 8} for group in "ab"}, 10)]
    with pytest.raises(FxmpqError, match="no precision that b may take together.* w2a8, w8a8"):
        solve_program(losses, rows, start={"a": "w2a8", "b": "w4a8"})
    with pytest.raises(FxmpqError, match="no precision that a may take"):
        solve_program(losses, rows, start={"b": "w2a8"})
    mixed = {"a": "w2a8", "b": "w8a8"}
    assert solve_program(losses, rows, start=mixed).objective == 1.0
    with pytest.raises(FxmpqError, match="no precision that a, b may take together"):
        solve_program(losses, rows, ties=[["a", "b"]], start=mixed)


def test_integers_and_choices_are_each_others_inverse() -> None:
    losses = {group: {"w2a8": 0.5, "w8a8": 0.1} for group in "abc"}
    program = IntegerProgram.of(losses, [Row(losses, math.inf)], [["a", "c"]])
    assert (program.scale, program.instance.limits) == (10, ())
    choices = {"a": "w2a8", "b": "w8a8", "c": "w2a8"}
    keys = program.keys(choices)
    assert program.choices(keys) == choices
    chosen = [option.value for option in program.instance.options if option.key in keys]
    assert sorted(chosen) == [1, 10]
