from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxmpq.costs.table import CostTable
from fxmpq.errors import FxmpqError, InfeasibleBudgetError
from fxmpq.sensitivity.interactions import shrunk_pairs
from fxmpq.sensitivity.sensitivity import Sensitivity
from fxmpq.solver.program import Row, Solution, solve_program
from fxmpq.solver.quadratic.quadratic import quadratic

NAMES = ("w2a8", "w3a8", "w4a8", "w8a8")
BITS = (2, 3, 4, 8)
Case = tuple[Sensitivity, list[Row], list[list[str]]]


def made(rows: np.ndarray, sizes: list[int], method: str = "given") -> Sensitivity:
    power = iter(np.square(rows).mean(axis=0).tolist())
    values = {
        f"g{group}": {name: next(power) for name in NAMES[:size]}
        for group, size in enumerate(sizes)
    }
    return Sensitivity(values, method, None, rows)


def costs_of(sensitivity: Sensitivity) -> CostTable:
    """The limits hold the costs; the table need only be of the same groups and precisions."""
    return CostTable(
        {"weights": {g: dict.fromkeys(row, 1) for g, row in sensitivity.values.items()}}
    )


def loss(sensitivity: Sensitivity, choices: dict[str, str]) -> float:
    rows = sensitivity.projections
    assert rows is not None
    place = [sensitivity.entries.index(entry) for entry in choices.items()]
    return float(np.square(rows[:, place].sum(axis=1)).mean())


def within(row: Row, choices: dict[str, str]) -> bool:
    total = math.fsum(row.table[group][name] for group, name in choices.items())
    return total <= row.limit * (1 + 2.0**-50)


def optimum(case: Case) -> float:
    sensitivity, rows, ties = case
    found = math.inf
    for names in itertools.product(*sensitivity.values.values()):
        choices = dict(zip(sensitivity.values, names, strict=True))
        if any(len({choices[group] for group in tie}) > 1 for tie in ties):
            continue
        if all(within(row, choices) for row in rows):
            found = min(found, loss(sensitivity, choices))
    return found


def solved(case: Case, **options: float) -> Solution:
    sensitivity, rows, ties = case
    found = quadratic(sensitivity, costs_of(sensitivity), rows, ties=ties, **options)
    assert list(found.choices) == list(sensitivity.values)
    assert all(within(row, found.choices) for row in rows)
    assert all(len({found.choices[group] for group in tie}) <= 1 for tie in ties)
    scale = sum(max(row.values()) for row in sensitivity.values.values())
    assert found.objective == pytest.approx(
        loss(sensitivity, found.choices), rel=1e-9, abs=1e-12 * scale
    )
    assert found.bound <= found.objective
    assert (found.status == "optimal") == (found.gap == 0)
    return found


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Programs small enough to enumerate, degenerate ones among them."""
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    draws = draw(st.integers(1, 8))
    generator = np.random.default_rng(draw(st.integers(0, 10**6)))
    shape = (draws, sum(sizes))
    kind = draw(st.sampled_from(["normal", "integer", "zero", "equal", "spread"]))
    matrix = {
        "normal": generator.normal(size=shape),
        "integer": generator.integers(-2, 3, shape).astype(float),
        "zero": np.zeros(shape),
        "equal": np.ones(shape),
        "spread": generator.normal(size=shape) * 10 ** generator.uniform(-4, 1, shape[1]),
    }[kind]
    sensitivity = made(matrix, sizes)
    rows = []
    for _ in range(draw(st.integers(0, 3))):
        most = draw(st.sampled_from([3, 100, 10**9]))
        costs = {
            group: {name: int(generator.integers(0, most)) for name in row}
            for group, row in sensitivity.values.items()
        }
        low = sum(min(row.values()) for row in costs.values())
        high = sum(max(row.values()) for row in costs.values())
        rows.append(Row(costs, low + int(draw(st.floats(-0.1, 1.0)) * (high - low))))
    groups = list(sensitivity.values)
    ties = draw(st.just([]) | st.lists(st.lists(st.sampled_from(groups), max_size=3), max_size=2))
    return sensitivity, rows, ties


@settings(max_examples=120, deadline=None)
@given(case=cases())
def test_the_optimum_is_that_of_enumeration(case: Case) -> None:
    expected = optimum(case)
    if expected == math.inf:
        with pytest.raises(InfeasibleBudgetError):
            solved(case)
        return
    found = solved(case)
    scale = sum(max(row.values()) for row in case[0].values.values())
    assert found.objective == pytest.approx(expected, rel=2e-9, abs=1e-12 * scale)
    assert (found.status, found.gap) == ("optimal", 0.0)


def real_like(groups: int, draws: int = 100, method: str = "given", share: float = 4) -> Case:
    """Errors that share directions across groups and candidates, under a size limit."""
    generator = np.random.default_rng(3)
    shared = generator.normal(size=(draws, 3))
    columns: list[np.ndarray] = []
    for _ in range(groups):
        direction = shared @ generator.normal(size=3) + 2 * generator.normal(size=draws)
        columns += [(direction + generator.normal(size=draws)) * 2.0**-bits for bits in BITS]
    sensitivity = made(np.array(columns).T, [len(BITS)] * groups, method)
    sizes = generator.integers(100, 10_000, groups).tolist()
    costs = {
        group: {name: size * bits for name, bits in zip(NAMES, BITS, strict=True)}
        for group, size in zip(sensitivity.values, sizes, strict=True)
    }
    return sensitivity, [Row(costs, int(share * sum(sizes)))], []


@pytest.mark.parametrize("solver", ["cbc", "highs"])
def test_a_larger_program_is_proven_and_beats_the_additive_plan(solver: str) -> None:
    sensitivity, rows, _ = case = real_like(16)
    found = quadratic(sensitivity, costs_of(sensitivity), rows, solver=solver)
    additive = solve_program(sensitivity.values, rows)
    assert found.status == "optimal"
    assert found.objective < loss(sensitivity, additive.choices)
    generator = np.random.default_rng(0)
    for _ in range(2000):
        names = generator.choice(NAMES, 16)
        choices = dict(zip(sensitivity.values, map(str, names), strict=True))
        if within(rows[0], choices):
            assert loss(sensitivity, choices) >= found.bound
    assert solved(case).choices == found.choices


def test_two_runs_agree_and_leave_torch_threads_alone() -> None:
    case = real_like(10)
    threads = torch.get_num_threads()
    first, second = solved(case), solved(case)
    assert (first.choices, first.objective) == (second.choices, second.objective)
    assert torch.get_num_threads() == threads


def test_without_interactions_it_is_the_integer_program() -> None:
    rows = np.diag(np.sqrt([4.0, 2.0, 1.0, 0.0, 8.0, 3.0, 2.0, 0.5]))
    sensitivity = made(rows, [4, 4])
    costs = Row({group: dict(zip(NAMES, BITS, strict=True)) for group in ("g0", "g1")}, 9)
    found = quadratic(sensitivity, costs_of(sensitivity), [costs])
    expected = solve_program(sensitivity.values, [costs])
    assert found.choices == expected.choices
    assert found.objective == pytest.approx(expected.objective, rel=1e-12)
    assert found.status == "optimal"


def test_full_shrinkage_is_the_integer_program_on_the_diagonal() -> None:
    sensitivity, rows, _ = real_like(8)
    found = quadratic(sensitivity, costs_of(sensitivity), rows, shrinkage=1.0)
    expected = solve_program(sensitivity.values, rows)
    assert found.choices == expected.choices
    assert found.objective == pytest.approx(expected.objective, rel=1e-9)


def test_tied_groups_add_their_errors_and_not_their_squares() -> None:
    rows = np.array([[1.0, 0.2, -1.0, 0.2, 0.9, 0.1]])
    values = {name: {"w4a8": 1.0, "w8a8": 0.0} for name in ("a", "b", "c")}
    sensitivity = Sensitivity(values, projections=rows)
    costs = Row({name: {"w4a8": 4, "w8a8": 8} for name in values}, 20)
    found = quadratic(sensitivity, costs_of(sensitivity), [costs], ties=[("a", "b")])
    # At 4 bits the errors of a and b cancel, which their own values do not show.
    assert found.choices == {"a": "w4a8", "b": "w4a8", "c": "w8a8"}
    assert found.objective == pytest.approx(0.01)


def test_projected_interactions_are_shrunk_unless_told_otherwise() -> None:
    sensitivity, rows, _ = real_like(8, draws=20, method="projected")
    given = quadratic(sensitivity, costs_of(sensitivity), rows, shrinkage=0.0)
    shrunk = quadratic(sensitivity, costs_of(sensitivity), rows)
    place = [sensitivity.entries.index(entry) for entry in shrunk.choices.items()]
    matrix = shrunk_pairs(sensitivity)
    assert shrunk.objective == pytest.approx(matrix[np.ix_(place, place)].sum())
    assert given.objective == pytest.approx(loss(sensitivity, given.choices))
    assert shrunk.objective > given.objective


def test_a_limit_met_exactly_is_met_and_one_missed_by_a_unit_is_not() -> None:
    large = 10**15 + 1
    rows = np.array([[1.0, 0.1, 1.0, 0.1, 1.0, 0.1]])
    values = {name: {"w2a8": 1.0, "w8a8": 0.01} for name in ("a", "b", "c")}
    sensitivity = Sensitivity(values, projections=rows)
    costs = {name: {"w2a8": 0, "w8a8": large} for name in values}
    for limit, most in ((2 * large, 2), (2 * large - 1, 1)):
        row = Row(costs, limit)
        found = quadratic(sensitivity, costs_of(sensitivity), [row])
        assert list(found.choices.values()).count("w8a8") == most
        assert found.status == "optimal"


def test_a_time_limit_returns_the_best_choice_with_a_valid_bound() -> None:
    sensitivity, rows, ties = real_like(40)
    found = solved((sensitivity, rows, ties), time_limit=0.3)
    assert found.status == "feasible"
    additive = solve_program(sensitivity.values, rows)
    assert 0 <= found.bound < found.objective <= loss(sensitivity, additive.choices)
    assert 0 < found.gap <= 1


def test_a_gap_that_is_allowed_stops_early_with_a_valid_bound() -> None:
    case = real_like(14)
    loose, proven = solved(case, max_gap=0.2), solved(case)
    assert loose.gap <= 0.2
    assert loose.bound <= proven.objective <= loose.objective


def test_methods_without_interactions_and_unknown_solvers_are_refused() -> None:
    row = Row({"a": {"w4a8": 4}}, 9)
    plain = Sensitivity({"a": {"w4a8": 1.0}}, method="sqnr")
    with pytest.raises(FxmpqError, match="'sqnr' measures no interactions"):
        quadratic(plain, costs_of(plain), [row])
    sensitivity = Sensitivity({"a": {"w4a8": 1.0}}, projections=np.ones((1, 1)))
    with pytest.raises(FxmpqError, match="no solver 'gurobi'"):
        quadratic(sensitivity, costs_of(sensitivity), [row], solver="gurobi")
    with pytest.raises(FxmpqError, match="shrinkage is 1.5"):
        quadratic(sensitivity, costs_of(sensitivity), [row], shrinkage=1.5)
    assert quadratic(sensitivity, costs_of(sensitivity), [row]).objective == 1.0
