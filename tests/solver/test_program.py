from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fxmpq.errors import FxmpqError, InfeasibleBudgetError
from fxmpq.solver import lists
from fxmpq.solver.program import Row, Solution, solve_program
from fxmpq.solver.ties import Table

from .conftest import opposed_limits

NAMES = ("w2a8", "w3a8", "w4a8", "w6a8", "w8a8")
SOLVERS = ("cbc", "highs")
PER_TEST = HealthCheck.function_scoped_fixture
Instance = tuple[dict[str, dict[str, float]], list[Row], list[list[str]]]

small = st.integers(-3, 3).map(float)
wide = st.builds(
    lambda exponent, sign: sign * 10.0**exponent, st.floats(-12, 6), st.sampled_from([-1.0, 1.0])
)
positive = st.floats(-12, 6).map(lambda exponent: 10.0**exponent)
values = st.sampled_from([small, wide, positive, st.just(0.0)])
usages = st.sampled_from(
    [
        st.just(0),
        st.integers(0, 5),
        st.integers(0, 10**9),
        st.integers(999_999, 1_000_001),
        st.floats(0, 10),
    ]
)


@st.composite
def instances(draw: st.DrawFn) -> Instance:
    """Programs small enough to enumerate; now and then a degenerate or an infeasible one."""
    groups = [f"g{index}" for index in range(draw(st.integers(1, 5)))]
    options = {group: NAMES[: draw(st.integers(1, 4))] for group in groups}
    value = draw(values)
    objective = {group: {name: draw(value) for name in options[group]} for group in groups}
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        usage = draw(usages)
        table = {group: {name: draw(usage) for name in options[group]} for group in groups}
        low = math.fsum(min(row.values()) for row in table.values())
        high = math.fsum(max(row.values()) for row in table.values())
        rows.append(Row(table, low + draw(st.floats(-0.1, 1.0)) * (high - low)))
    ties = draw(st.just([]) | st.lists(st.lists(st.sampled_from(groups), max_size=3), max_size=2))
    return objective, rows, ties


def optimum(objective: Table, rows: list[Row], ties: list[list[str]]) -> float:
    """Least objective of all choices, by enumeration; infinite if none is within the rows."""
    found = math.inf
    for names in itertools.product(*objective.values()):
        choice = dict(zip(objective, names, strict=True))
        if any(len({choice[group] for group in tie}) > 1 for tie in ties):
            continue
        if all(within(row, choice) for row in rows):
            found = min(found, total(objective, choice))
    return found


def total(table: Table, choice: dict[str, str]) -> float:
    return math.fsum(table[group][name] for group, name in choice.items())


def within(row: Row, choice: dict[str, str]) -> bool:
    return total(row.table, choice) <= row.limit + abs(row.limit) * 2.0**-50


def check(solution: Solution, instance: Instance, expected: float) -> None:
    objective, rows, ties = instance
    assert list(solution.choices) == list(objective)
    assert all(within(row, solution.choices) for row in rows)
    assert all(len({solution.choices[group] for group in tie}) <= 1 for tie in ties)
    assert solution.objective == total(objective, solution.choices)
    shift = math.fsum(min(row.values()) for row in objective.values())
    tolerance = 1e-9 * abs(expected - shift) + 1e-15 * abs(shift)
    assert solution.objective == pytest.approx(expected, rel=1e-12, abs=tolerance)
    assert solution.bound == solution.objective
    assert (solution.status, solution.gap) == ("optimal", 0.0)


@pytest.fixture(params=[*SOLVERS, "lists"])
def solver(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A solver that is not spared the work, or the exact lists that do so with these sizes."""
    if request.param == "lists":
        return "cbc"
    monkeypatch.setattr(lists, "_MOST", 0)
    return str(request.param)


@settings(max_examples=150, deadline=None, suppress_health_check=[PER_TEST])
@given(instance=instances())
def test_the_optimum_is_that_of_enumeration(solver: str, instance: Instance) -> None:
    objective, rows, ties = instance
    if (expected := optimum(*instance)) == math.inf:
        with pytest.raises((InfeasibleBudgetError, FxmpqError), match=r"limit|share no precision"):
            solve_program(objective, rows, ties=ties, solver=solver)
    else:
        found = solve_program(objective, rows, ties=ties, solver=solver)
        check(found, instance, expected)


def near_misses(count: int) -> Instance:
    """Half of the groups just do not fit: a solver's tolerance lets each such choice through."""
    losses = {f"g{index}": {"w8a8": 0.0, "w2a8": 1.0 + index / 64} for index in range(count)}
    sizes = {group: {"w8a8": 10**8 + 1, "w2a8": 0} for group in losses}
    return losses, [Row(sizes, count // 2 * 10**8)], []


def test_a_choice_that_only_a_tolerance_lets_through_is_cut_off(solver: str) -> None:
    losses, rows, _ = instance = near_misses(4)
    found = solve_program(losses, rows, solver=solver)
    check(found, instance, optimum(*instance))
    assert sorted(found.choices.values()) == ["w2a8"] * 3 + ["w8a8"]


def test_many_choices_that_a_tolerance_lets_through_do_not_spoil_the_proof(solver: str) -> None:
    losses, rows, _ = near_misses(24)
    found = solve_program(losses, rows, solver=solver)
    assert within(rows[0], found.choices)
    best = math.fsum(sorted(row["w2a8"] for row in losses.values())[:13])
    assert (found.status, found.objective, found.bound) == ("optimal", best, best)


def test_what_is_infeasible_by_less_than_a_tolerance_is_infeasible(solver: str) -> None:
    large = 10**9 + 1
    groups = ("a", "b", "c")
    losses = {group: {"w2a8": 0.0, "w8a8": 0.0} for group in groups}
    first = Row({group: {"w2a8": large, "w8a8": 0} for group in groups}, 2 * 10**9)
    second = Row({group: {"w2a8": 0, "w8a8": large} for group in groups}, large)
    with pytest.raises(InfeasibleBudgetError, match="no choice is within all limits"):
        solve_program(losses, [first, second], solver=solver)
    choices = solve_program(losses, [first, Row(second.table, 2 * large)], solver=solver).choices
    assert sorted(choices.values()) == ["w2a8", "w8a8", "w8a8"]


def test_an_optimum_far_below_the_first_guess_is_exact(solver: str) -> None:
    """One price for all limits makes group `a` give way, when group `b` is far cheaper."""
    losses = {
        "a": {"w8a8": 0.0, "w2a8": 1e4},
        "b": {"w8a8": 0.0, "w2a8": 1.0},
        "c": {"w8a8": 0.0, "w2a8": 1.000001},
    }
    sizes = {
        "a": {"w8a8": 10**5, "w2a8": 0},
        "b": {"w8a8": 1, "w2a8": 0},
        "c": {"w8a8": 1, "w2a8": 0},
    }
    found = solve_program(losses, [Row(sizes, 10**5 + 1)], solver=solver)
    assert found.choices == {"a": "w8a8", "b": "w2a8", "c": "w8a8"}
    assert (found.objective, found.gap) == (1.0, 0.0)


@pytest.mark.parametrize("scale", [1e-15, 1e-9, 1.0, 1e9])
def test_the_unit_of_the_values_does_not_matter(solver: str, scale: float) -> None:
    generator = np.random.default_rng(5)
    draws = generator.lognormal(0, 2, (12, 4))
    losses = {
        f"g{index}": {
            name: scale * value * 4.0**-bits
            for name, value, bits in zip(NAMES, row, range(4), strict=False)
        }
        for index, row in enumerate(draws.tolist())
    }
    sizes = {
        group: {name: int(size) * bits for bits, name in enumerate(NAMES[:4], 2)}
        for group, size in zip(losses, generator.integers(1, 99, 12), strict=True)
    }
    limit = sum(row["w3a8"] for row in sizes.values())
    found = solve_program(losses, [Row(sizes, limit)], solver=solver)
    unscaled = {
        group: {name: value / scale for name, value in row.items()} for group, row in losses.items()
    }
    assert found.choices == solve_program(unscaled, [Row(sizes, limit)], solver=solver).choices
    assert found.gap == 0.0


def hard(groups: int = 30) -> Instance:
    generator = np.random.default_rng(1)
    losses: dict[str, dict[str, float]] = {}
    tables: list[dict[str, dict[str, float]]] = [{}, {}]
    for index in range(groups):
        group, size = f"g{index}", int(generator.integers(100, 10**6))
        losses[group] = {
            name: float(generator.lognormal() * 4.0**-bits) for bits, name in enumerate(NAMES, 2)
        }
        for table in tables:
            table[group] = {
                name: int(size * bits * generator.uniform(0.5, 2.0))
                for bits, name in enumerate(NAMES, 2)
            }
    rows = [Row(table, sum(row["w3a8"] for row in table.values())) for table in tables]
    return losses, rows, []


@pytest.mark.parametrize("solver", SOLVERS)
def test_no_time_gives_the_best_choice_known_and_an_honest_bound(solver: str) -> None:
    losses, rows, _ = hard()
    best = solve_program(losses, rows, solver=solver)
    assert (best.status, best.gap) == ("optimal", 0.0)
    found = solve_program(losses, rows, solver=solver, time_limit=0.0)
    assert found.status == "feasible"
    assert all(within(row, found.choices) for row in rows)
    assert found.bound < best.objective <= found.objective
    assert found.gap == (found.objective - found.bound) / found.objective > 0


def test_no_time_and_no_choice_is_not_called_infeasible() -> None:
    losses, rows = opposed_limits()
    with pytest.raises(
        FxmpqError, match=r"cbc found no choice .* in 0 s.*longer time_limit"
    ) as caught:
        solve_program(losses, rows, time_limit=0.0)
    assert not isinstance(caught.value, InfeasibleBudgetError)
    found = solve_program(losses, rows).choices
    assert list(found.values()) == ["w2a8", "w4a8", "w2a8", "w8a8"]


def test_a_gap_allows_stopping_early() -> None:
    losses, rows, _ = hard()
    best = solve_program(losses, rows)
    found = solve_program(losses, rows, max_gap=0.2)
    assert all(within(row, found.choices) for row in rows)
    assert found.bound <= best.objective <= found.objective
    assert found.gap <= 0.2


def test_no_limits_choose_the_least_of_every_group() -> None:
    losses = {"a": {"w2a8": 0.5, "w8a8": -1.0}, "b": {"w2a8": 0.0, "w8a8": 3.0}}
    for rows in ([], [Row(losses, math.inf)]):
        found = solve_program(losses, rows)
        assert found.choices == {"a": "w8a8", "b": "w2a8"}
        assert (found.objective, found.bound, found.status) == (-1.0, -1.0, "optimal")


@pytest.mark.parametrize(
    ("objective", "bound", "gap"),
    [
        (2.0, 1.0, 0.5),
        (2.0, 2.0, 0.0),
        (2.0, 2.5, 0.0),
        (-1.0, -3.0, 2.0),
        (0.0, -3.0, 1.0),
        (1e-320, -1e300, 1.7976931348623157e308),
    ],
)
def test_the_gap_is_relative_and_finite(objective: float, bound: float, gap: float) -> None:
    assert Solution({}, objective, bound, "feasible", 0.0).gap == gap


def test_an_unknown_solver_shows_the_known_ones() -> None:
    with pytest.raises(FxmpqError, match="no solver 'gurobi'; there are 'cbc', 'highs'"):
        solve_program({"a": {"w8a8": 0.0}}, [], solver="gurobi")


@pytest.mark.parametrize(("limit", "second"), [(1, 9), (3, 1)])
def test_a_program_that_cannot_be_met(limit: int, second: int) -> None:
    rows = [Row({"a": {"w2a8": 2, "w8a8": 4}}, limit), Row({"a": {"w2a8": 3, "w8a8": 1}}, second)]
    with pytest.raises(InfeasibleBudgetError, match="no choice is within all limits"):
        solve_program({"a": {"w2a8": 0.0, "w8a8": 0.0}}, rows)


def test_a_malformed_program_is_refused() -> None:
    with pytest.raises(FxmpqError, match="at least one group, each with a precision"):
        solve_program({"a": {}}, [])
    with pytest.raises(FxmpqError, match="a limit lacks group 'a' at w8a8"):
        solve_program({"a": {"w8a8": 0.0}}, [Row({"a": {"w4a8": 1}}, 3)])
    with pytest.raises(FxmpqError, match="a limit is NaN"):
        Row({"a": {"w8a8": 1}}, math.nan)


def test_torch_keeps_its_threads() -> None:
    objective = {name: {"w2a8": 3.0, "w4a8": 1.0, "w8a8": 0.0} for name in "abc"}
    size = {name: {"w2a8": 2, "w4a8": 4, "w8a8": 8} for name in "abc"}
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        solve_program(objective, [Row(size, 13)])
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
