from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxmpq.errors import FxmpqError
from fxmpq.solver.choices import Problem, Row, Unit, build_problem, drop_hopeless, relax

NAMES = ("w2a8", "w3a8", "w4a8", "w8a8")
value = (
    st.just(0.0)
    | st.integers(-3, 3).map(float)
    | st.builds(
        lambda exponent, sign: sign * 10.0**exponent, st.floats(-12, 6), st.sampled_from([-1, 1])
    )
)
usage = st.integers(0, 6) | st.integers(0, 10**9)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    groups = [f"g{index}" for index in range(draw(st.integers(1, 5)))]
    names = {group: NAMES[: draw(st.integers(1, 4))] for group in groups}
    objective = {group: {name: draw(value) for name in names[group]} for group in groups}
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        table = {group: {name: draw(usage) for name in names[group]} for group in groups}
        low = sum(min(row.values()) for row in table.values())
        high = sum(max(row.values()) for row in table.values())
        rows.append(Row(table, draw(st.integers(low, high))))
    return build_problem(objective, rows, ())


def best(problem: Problem) -> float:
    """Least sum of values of all choices within the rooms; infinite if none is."""
    found = math.inf
    for options in itertools.product(*(range(len(unit.names)) for unit in problem.units)):
        pairs = list(zip(problem.units, options, strict=True))
        if all(
            math.fsum(unit.usage[index, pick] for unit, pick in pairs) <= room
            for index, room in enumerate(problem.rooms)
        ):
            found = min(found, math.fsum(unit.values[pick] for unit, pick in pairs))
    return found


@given(problems())
def test_units_are_shifted_to_zero(problem: Problem) -> None:
    for unit in problem.units:
        assert unit.values.min() == 0
        assert (unit.usage.min(axis=1) == 0).all()


@given(problems())
def test_drop_hopeless_keeps_the_optimum(problem: Problem) -> None:
    smaller = drop_hopeless(problem)
    assert best(smaller) == best(problem)
    assert smaller.rooms is problem.rooms
    for before, after in zip(problem.units, smaller.units, strict=True):
        assert set(after.names) <= set(before.names)


@given(problems())
def test_drop_hopeless_leaves_no_option_that_another_beats(problem: Problem) -> None:
    for unit in drop_hopeless(problem).units:
        rows = [(unit.values[i], *unit.usage[:, i]) for i in range(len(unit.names))]
        for one, other in itertools.permutations(rows, 2):
            assert any(a < b for a, b in zip(one, other, strict=True))


def test_drop_hopeless_drops_what_does_not_fit_and_later_twins() -> None:
    unit = Unit(
        ("a",),
        ("w2a8", "w3a8", "w4a8", "w8a8"),
        np.array([2.0, 1, 1, 0]),
        np.array([[0.0, 1, 1, 9]]),
    )
    (kept,) = drop_hopeless(Problem((unit,), 0.0, np.array([5.0]))).units
    assert kept.names == ("w2a8", "w3a8")


@given(problems())
def test_relax_bounds_the_optimum_from_below_and_keeps_it(problem: Problem) -> None:
    usable = drop_hopeless(problem)
    optimum = best(usable)
    if not all(unit.names for unit in usable.units):
        assert optimum == math.inf
        return
    relaxed = relax(usable)
    assert relaxed.bound <= optimum
    assert relaxed.value >= optimum
    assert best(relaxed.problem) == optimum


@given(problems())
def test_relax_returns_a_choice_that_fits(problem: Problem) -> None:
    usable = drop_hopeless(problem)
    if not all(unit.names for unit in usable.units):
        return
    relaxed = relax(usable)
    if relaxed.picks is None:
        assert relaxed.value == math.inf
        assert relaxed.problem is usable
        return
    pairs = list(zip(relaxed.problem.units, relaxed.picks, strict=True))
    assert math.fsum(unit.values[pick] for unit, pick in pairs) == relaxed.value
    used = sum(unit.usage[:, pick] for unit, pick in pairs)
    assert np.all(used <= relaxed.problem.rooms)


def test_relax_solves_what_the_unconstrained_choice_solves() -> None:
    table = {"a": {"w4a8": 1, "w8a8": 2}, "b": {"w4a8": 1, "w8a8": 2}}
    losses = {"a": {"w4a8": 1.0, "w8a8": 0.0}, "b": {"w4a8": 2.0, "w8a8": 0.0}}
    relaxed = relax(build_problem(losses, [Row(table, 4)], ()))
    assert relaxed.value == relaxed.bound == 0.0
    assert [unit.names for unit in relaxed.problem.units] == [("w8a8",), ("w8a8",)]


def test_relax_prunes_to_a_small_core() -> None:
    """Fifty groups of four: what is left to decide is around the break group."""
    generator = np.random.default_rng(0)
    groups = [f"g{index}" for index in range(50)]
    sizes = generator.integers(100, 10_000, 50)
    table = {
        group: {name: int(size * bits) for name, bits in zip(NAMES, (2, 3, 4, 8), strict=True)}
        for group, size in zip(groups, sizes, strict=True)
    }
    losses = {
        group: {
            name: float(generator.lognormal() * 4.0**-bits)
            for name, bits in zip(NAMES, (2, 3, 4, 8), strict=True)
        }
        for group in groups
    }
    problem = drop_hopeless(build_problem(losses, [Row(table, int(sizes.sum() * 4))], ()))
    relaxed = relax(problem)
    assert relaxed.value - relaxed.bound < 0.01 * relaxed.value
    before = sum(len(unit.names) for unit in problem.units)
    assert sum(len(unit.names) for unit in relaxed.problem.units) < before / 2


def test_ties_are_merged_across_chains_in_the_order_of_the_groups() -> None:
    table = {name: {"w4a8": 1.0, "w8a8": 3.0} for name in "abcde"}
    problem = build_problem(table, [Row(table, 100)], [("d", "b"), ("e", "d"), ("c",)])
    assert [unit.groups for unit in problem.units] == [("a",), ("b", "d", "e"), ("c",)]
    np.testing.assert_array_equal(problem.units[1].values, [0.0, 6.0])
    np.testing.assert_array_equal(problem.units[1].usage, [[0.0, 6.0]])
    assert problem.offset == 5.0


def test_tied_groups_keep_the_precisions_they_share() -> None:
    objective = {"a": {"w2a8": 1.0, "w4a8": 2.0}, "b": {"w4a8": 3.0, "w8a8": 0.0}}
    (unit,) = build_problem(objective, [], [("a", "b")]).units
    assert unit.names == ("w4a8",)
    assert unit.usage.shape == (0, 1)


def test_tied_groups_that_share_nothing_are_named() -> None:
    objective = {"a": {"w2a8": 1.0}, "b": {"w4a8": 3.0}}
    with pytest.raises(FxmpqError, match="tied groups a, b share no precision"):
        build_problem(objective, [], [("a", "b")])


def test_a_tie_to_an_unknown_group_shows_the_closest() -> None:
    with pytest.raises(FxmpqError, match="a tie names 'conv11'; closest: 'conv1'"):
        build_problem({"conv1": {"w4a8": 1.0}}, [], [("conv1", "conv11")])


@pytest.mark.parametrize("objective", [{}, {"a": {}}])
def test_an_empty_program_is_refused(objective: dict[str, dict[str, float]]) -> None:
    with pytest.raises(FxmpqError, match="at least one group, each with a precision"):
        build_problem(objective, [], ())


@pytest.mark.parametrize("table", [{}, {"a": {"w4a8": 1}}])
def test_a_limit_that_lacks_an_entry_is_refused_by_name(table: dict[str, dict[str, float]]) -> None:
    with pytest.raises(FxmpqError, match=r"a limit lacks group 'a' at .*w8a8"):
        build_problem({"a": {"w4a8": 1.0, "w8a8": 0.0}}, [Row(table, 1)], ())


def test_a_limit_that_is_no_number_is_refused() -> None:
    with pytest.raises(FxmpqError, match="a limit is NaN"):
        Row({"a": {"w4a8": 1}}, math.nan)


@given(st.lists(st.lists(st.floats(0, 1e6), min_size=1, max_size=4), min_size=1, max_size=6))
def test_a_limit_that_equals_a_sum_of_fractions_is_met_by_it(
    entries: list[list[float]],
) -> None:
    table = {f"g{index}": dict(zip(NAMES, row, strict=False)) for index, row in enumerate(entries)}
    for pick in (min, max):
        limit = math.fsum(pick(row.values()) for row in table.values())
        problem = build_problem(table, [Row(table, limit)], ())
        used = math.fsum(pick(unit.usage[0]) for unit in problem.units)
        assert used <= problem.rooms[0]


@given(st.integers(1, 2**49), st.integers(1, 5))
def test_limits_of_integers_are_exact(cost: int, groups: int) -> None:
    table = {f"g{index}": {"w4a8": cost // groups} for index in range(groups)}
    total = groups * (cost // groups)
    assert build_problem(table, [Row(table, total)], ()).rooms[0] >= 0
    assert build_problem(table, [Row(table, total - 1)], ()).rooms[0] < 0
