from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from fxmpq.costs.table import CostTable
from fxmpq.errors import BudgetError, FxmpqError, InfeasibleBudgetError
from fxmpq.sensitivity.sensitivity import Sensitivity
from fxmpq.solver.lp import lp, lp_shares
from fxmpq.solver.lp_rounding import ROUNDINGS
from fxmpq.solver.program import Row, Solution, solve_program

from .conftest import opposed_limits

NAMES = ("w2a8", "w3a8", "w4a8", "w8a4", "w8a8")
SOLVERS = ("cbc", "highs")
Values = dict[str, dict[str, float]]
Instance = tuple[Values, list[Row], list[list[str]]]

losses = st.one_of(st.integers(0, 6).map(float), st.floats(0, 3), st.just(0.0))
usages = st.sampled_from([st.integers(0, 6), st.integers(0, 10**9), st.floats(0, 4)])


@st.composite
def instances(draw: st.DrawFn) -> Instance:
    """Small programs, now and then degenerate or infeasible."""
    groups = [f"g{index}" for index in range(draw(st.integers(1, 5)))]
    options = {group: NAMES[: draw(st.integers(1, 5))] for group in groups}
    values = {group: {name: draw(losses) for name in options[group]} for group in groups}
    rows = []
    for _ in range(draw(st.integers(0, 3))):
        usage = draw(usages)
        table = {group: {name: draw(usage) for name in options[group]} for group in groups}
        low = math.fsum(min(row.values()) for row in table.values())
        high = math.fsum(max(row.values()) for row in table.values())
        rows.append(Row(table, low + draw(st.floats(-0.05, 1.0)) * (high - low)))
    ties = draw(st.just([]) | st.lists(st.lists(st.sampled_from(groups), max_size=2), max_size=1))
    return values, rows, ties


def run(values: Values, rows: list[Row], **options: object) -> Solution:
    costs = {f"cost{index}": row.table for index, row in enumerate(rows)}
    if not rows:
        costs["cost"] = {group: dict.fromkeys(row, 0) for group, row in values.items()}
    return lp(Sensitivity(values), CostTable(costs), rows, **options)  # type: ignore[arg-type]


def total(table: Values, choice: dict[str, str]) -> float:
    return math.fsum(table[group][name] for group, name in choice.items())


def reference(values: Values, rows: list[Row]) -> float:
    """Optimum of the linear relaxation by scipy, nothing reduced."""
    entries = [(group, name) for group, row in values.items() for name in row]
    one = [[float(group == other) for group, _ in entries] for other in values]
    taken = [[row.table[group][name] / (row.limit or 1) for group, name in entries] for row in rows]
    found = linprog(
        [values[group][name] for group, name in entries],
        A_ub=taken or None,
        b_ub=[float(row.limit != 0) for row in rows] or None,
        A_eq=one,
        b_eq=np.ones(len(values)),
    )
    assert found.success
    return float(found.fun)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("solver", SOLVERS)
@settings(max_examples=60, deadline=None)
@given(instance=instances())
def test_the_choice_is_within_the_limits_and_above_the_bound(
    rounding: str, solver: str, instance: Instance
) -> None:
    values, rows, ties = instance
    try:
        best = solve_program(values, rows, ties=ties).objective
    except InfeasibleBudgetError:
        with pytest.raises(InfeasibleBudgetError, match="no choice is within all limits"):
            run(values, rows, ties=ties, rounding=rounding, solver=solver)
        return
    found = run(values, rows, ties=ties, rounding=rounding, solver=solver)
    assert list(found.choices) == list(values)
    assert found.objective == total(values, found.choices)
    for row in rows:
        assert total(row.table, found.choices) <= row.limit * (1 + 2.0**-49)
    assert all(len({found.choices[group] for group in tie}) <= 1 for tie in ties)
    assert found.bound <= best * (1 + 1e-12) + 1e-15
    assert best <= found.objective * (1 + 1e-12) + 1e-15
    assert found.status == "feasible" or found.bound == found.objective == best
    if all(row.limit > 1e-6 for row in rows) and not ties:
        assert found.bound >= reference(values, rows) - 2e-6


@pytest.mark.parametrize("solver", SOLVERS)
@settings(max_examples=60, deadline=None)
@given(instance=instances())
def test_shares_solve_the_relaxation_with_no_more_groups_between_than_limits(
    solver: str, instance: Instance
) -> None:
    values, rows, ties = instance
    try:
        best = solve_program(values, rows, ties=ties).objective
    except InfeasibleBudgetError:
        return
    shares = lp_shares(Sensitivity(values), rows, ties=ties, solver=solver)
    assert {group: list(row) for group, row in shares.items()} == {
        group: [name for name in row if name in shares[group]] for group, row in values.items()
    }
    for row in shares.values():
        assert sum(row.values()) == pytest.approx(1.0)
        assert min(row.values()) >= -1e-9
    for limit in rows:
        used = sum(limit.table[g][n] * x for g, row in shares.items() for n, x in row.items())
        assert used <= limit.limit + 1e-6 * (1 + abs(limit.limit))
    lost = sum(values[g][n] * x for g, row in shares.items() for n, x in row.items())
    assert lost <= best + 1e-6 * (1 + best)
    between = {g for g, row in shares.items() if max(row.values()) < 1 - 1e-6}
    units = between - {member for tie in ties for member in tie[1:] if member != tie[0]}
    assert len(units) <= len(rows)
    if not between:
        for rounding in ROUNDINGS:
            found = run(values, rows, ties=ties, solver=solver, rounding=rounding)
            assert found.objective == pytest.approx(best, rel=1e-6, abs=1e-6)


def linear(count: int, seed: int) -> tuple[Values, list[Row]]:
    """What is lost and what is taken fall and rise linearly in the bits of each group."""
    generator = np.random.default_rng(seed)
    weight = generator.uniform(0.1, 1.0, count).tolist()
    sizes = generator.integers(10**3, 10**6, count).tolist()
    bits = (2, 3, 4, 5, 6, 7, 8)
    values = {f"g{n}": {f"w{b}a8": w * (8 - b) / 8 for b in bits} for n, w in enumerate(weight)}
    table = {f"g{n}": {f"w{b}a8": size * b for b in bits} for n, size in enumerate(sizes)}
    return values, [Row(table, int(4.37 * sum(sizes)))]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_linear_program_over_bits_is_that_of_bounded_real_bits(solver: str, seed: int) -> None:
    values, rows = linear(21, seed)
    shares = lp_shares(Sensitivity(values), rows, solver=solver)
    real = np.array([sum(int(n[1]) * x for n, x in row.items()) for row in shares.values()])
    weight = np.array([row["w2a8"] * 8 / 6 for row in values.values()])
    sizes = np.array([row["w2a8"] / 2 for row in rows[0].table.values()])
    expected = linprog(-weight, A_ub=[sizes / sizes.sum()], b_ub=[4.37], bounds=[(2, 8)])
    np.testing.assert_allclose(real, expected.x, atol=1e-5)
    lost = float((weight * (8 - real) / 8).sum())
    found = run(values, rows, solver=solver, rounding="search")
    assert found.bound == pytest.approx(lost, rel=1e-6)
    # One limit leaves one group between, and the search rounds it to a neighbour.
    chosen = np.array([int(name[1]) for name in found.choices.values()])
    assert np.abs(chosen - real).max() < 1
    assert (np.abs(chosen - real) > 1e-6).sum() <= 1


def test_nearest_rounding_that_exceeds_the_limit_is_repaired_and_room_is_filled() -> None:
    values = {
        "a": {"w8a8": 0.0, "w4a8": 9.0},
        "b": {"w8a8": 0.0, "w4a8": 4.0},
        "c": {"w8a8": 0.0, "w4a8": 0.3},
    }
    size: Values = {
        "a": {"w8a8": 10, "w4a8": 1},
        "b": {"w8a8": 10, "w4a8": 1},
        "c": {"w8a8": 4, "w4a8": 1},
    }
    rows = [Row(size, 18)]
    shares = lp_shares(Sensitivity(values), rows)
    assert [round(row["w8a8"], 4) for row in shares.values()] == [1.0, 0.6667, 0.0]
    # Nearest would be 8 bits for b, 21 in all; stepping it down leaves 6, of which c takes 3.
    nearest = run(values, rows, rounding="nearest")
    assert nearest.choices == {"a": "w8a8", "b": "w4a8", "c": "w8a8"}
    assert nearest.objective == 4.0
    # The search leaves the other groups where the linear program has them.
    search = run(values, rows, rounding="search")
    assert search.choices == {"a": "w8a8", "b": "w4a8", "c": "w4a8"}
    assert search.objective == 4.3
    for found in (nearest, search):
        assert found.bound == pytest.approx(0.3 + 4 / 3, rel=1e-9)


def test_the_search_finds_the_best_of_all_floors_and_ceilings() -> None:
    generator = np.random.default_rng(2)
    groups = [f"g{index}" for index in range(8)]
    bits = (2, 4, 6, 8)
    values = {
        group: {f"w{b}a8": float(generator.lognormal() * 4.0**-b) for b in bits} for group in groups
    }
    rows = []
    for _ in range(3):
        table = {
            group: {f"w{b}a8": int(generator.integers(10, 99) * b) for b in bits}
            for group in groups
        }
        middle = sum(sorted(row.values())[1] for row in table.values())
        rows.append(Row(table, middle))
    shares = lp_shares(Sensitivity(values), rows)
    around = []
    for row in shares.values():
        real = sum(int(name[1]) * share for name, share in row.items())
        exact = [b for b in bits if abs(b - real) < 1e-6]
        below, above = [b for b in bits if b < real][-1:], [b for b in bits if b > real][:1]
        around.append([f"w{b}a8" for b in exact or [*below, *above]])
    assert sum(len(names) == 2 for names in around) >= 2
    best = math.inf
    for names in itertools.product(*around):
        choice = dict(zip(groups, names, strict=True))
        if all(total(row.table, choice) <= row.limit for row in rows):
            best = min(best, total(values, choice))
    found = run(values, rows, rounding="search")
    assert found.objective == pytest.approx(best, rel=1e-12)


def test_ties_share_one_precision_and_its_shares() -> None:
    values, rows = linear(6, 0)
    ties = [["g0", "g3"]]
    shares = lp_shares(Sensitivity(values), rows, ties=ties)
    assert shares["g0"] == shares["g3"]
    found = run(values, rows, ties=ties)
    assert found.choices["g0"] == found.choices["g3"]


def test_where_no_single_step_helps_some_choice_within_the_limits_is_found() -> None:
    values, rows = opposed_limits()
    for rounding in ROUNDINGS:
        found = run(values, rows, rounding=rounding)
        assert list(found.choices.values()) == ["w2a8", "w4a8", "w2a8", "w8a8"]


def test_no_limit_or_a_loose_one_takes_the_least_loss_of_every_group() -> None:
    values = {"a": {"w2a8": 0.5, "w8a8": -1.0}, "b": {"w2a8": 0.0, "w8a8": 3.0}}
    size: Values = {"a": {"w2a8": 2, "w8a8": 8}, "b": {"w2a8": 2, "w8a8": 8}}
    for rows in ([], [Row(size, math.inf)], [Row(size, 16)]):
        found = run(values, rows)
        assert found.choices == {"a": "w8a8", "b": "w2a8"}
        assert (found.objective, found.bound, found.status) == (-1.0, -1.0, "optimal")


def test_bad_requests_are_refused_with_what_there_is() -> None:
    values, rows = linear(3, 0)
    with pytest.raises(FxmpqError, match="no rounding 'up'; there are 'nearest', 'search'"):
        run(values, rows, rounding="up")
    with pytest.raises(FxmpqError, match="no solver 'scip'; there are 'cbc', 'highs'"):
        run(values, rows, solver="scip")
    with pytest.raises(InfeasibleBudgetError, match="no choice is within all limits"):
        run(values, [Row(rows[0].table, 1)])
    with pytest.raises(BudgetError, match="cbc did not solve the linear program in 0 s; .*longer"):
        run(values, rows, time_limit=0.0)


@pytest.mark.parametrize("solver", SOLVERS)
def test_nothing_is_printed_and_torch_keeps_its_threads(
    solver: str, capfd: pytest.CaptureFixture[str]
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        values, rows = linear(5, 1)
        run(values, rows, solver=solver)
        lp_shares(Sensitivity(values), rows, solver=solver)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert capfd.readouterr() == ("", "")
