from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxmpq.solver.quadratic.descent import value
from fxmpq.solver.quadratic.outer_approximation import Optimum, minimise
from fxmpq.solver.quadratic.planes import Choices


def program(
    seed: int, groups: int, size: int, rank: int, limits: int
) -> tuple[np.ndarray, Choices, np.ndarray]:
    """A program whose first options fit together."""
    generator = np.random.default_rng(seed)
    options = groups * size
    factor = generator.normal(size=(rank, options)) * 10 ** generator.uniform(-1, 0, options)
    costs = generator.uniform(0, 2 / groups, (limits, options))
    costs[:, ::size] = 0
    return factor.T @ factor, Choices((size,) * groups, costs), np.arange(0, options, size)


def fits(choices: Choices, chosen: np.ndarray) -> bool:
    return bool((choices.costs[:, chosen].sum(axis=1) <= 1).all())


def run(
    matrix: np.ndarray, choices: Choices, start: np.ndarray, seconds: float = 60, gap: float = 0.0
) -> Optimum:
    return minimise(
        matrix,
        choices,
        start,
        is_met=lambda chosen: fits(choices, chosen),
        deadline=time.monotonic() + seconds,
        max_gap=gap,
    )


def least(matrix: np.ndarray, choices: Choices) -> float:
    ranges = [
        range(start, start + size)
        for start, size in zip(choices.starts.tolist(), choices.sizes, strict=True)
    ]
    found = map(np.array, itertools.product(*ranges))
    return min(value(matrix, chosen) for chosen in found if fits(choices, chosen))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    groups=st.integers(1, 5),
    size=st.integers(1, 4),
    rank=st.integers(1, 20),
    limits=st.integers(0, 2),
)
def test_the_optimum_is_that_of_enumeration(
    seed: int, groups: int, size: int, rank: int, limits: int
) -> None:
    matrix, choices, start = program(seed, groups, size, rank, limits)
    found = run(matrix, choices, start)
    assert fits(choices, found.chosen)
    assert found.value == value(matrix, found.chosen)
    expected = least(matrix, choices)
    assert found.value == pytest.approx(expected, rel=2e-9, abs=1e-12 * np.trace(matrix))
    assert found.bound == found.value


@pytest.mark.parametrize("scale", [1e-18, 1.0, 1e12])
def test_the_scale_of_the_values_does_not_matter(scale: float) -> None:
    matrix, choices, start = program(1, 7, 4, 20, 1)
    found, plain = run(scale * matrix, choices, start), run(matrix, choices, start)
    assert np.array_equal(found.chosen, plain.chosen)
    assert found.bound == found.value == pytest.approx(scale * plain.value)


def test_choices_of_equal_value_are_proven() -> None:
    # Whatever is chosen, the value is 16.
    matrix = np.ones((12, 12))
    found = run(matrix, Choices((3,) * 4, np.zeros((0, 12))), np.arange(0, 12, 3))
    assert (found.value, found.bound) == (16.0, 16.0)


def test_a_value_of_zero_is_proven_at_once() -> None:
    matrix, choices, start = program(1, 4, 3, 5, 1)
    found = run(0 * matrix, choices, start)
    assert (found.value, found.bound, found.planes) == (0.0, 0.0, 0)


def test_errors_that_cancel_exactly_are_found() -> None:
    # One direction: 3 - 5 + 2 = 0 is the only choice without an error.
    row = np.array([3.0, 7.0, -5.0, 9.0, 2.0, 11.0])
    matrix = np.outer(row, row)
    found = run(matrix, Choices((2, 2, 2), np.zeros((0, 6))), np.array([1, 3, 5]))
    assert found.chosen.tolist() == [0, 2, 4]
    assert found.value == found.bound == 0


def test_choices_that_the_caller_refuses_are_never_taken() -> None:
    matrix, choices, start = program(5, 5, 3, 12, 0)
    free = run(matrix, choices, start)
    banned = int(free.chosen[0])

    def is_met(chosen: np.ndarray) -> bool:
        return banned not in chosen

    found = minimise(matrix, choices, start, is_met=is_met, deadline=time.monotonic() + 60)
    assert banned not in found.chosen
    assert free.value < found.value


def test_without_time_the_start_comes_back_improved_with_a_valid_bound() -> None:
    matrix, choices, start = program(2, 8, 3, 30, 1)
    found = run(matrix, choices, start, seconds=0)
    assert found.value <= value(matrix, start)
    assert 0 <= found.bound <= least(matrix, choices) <= found.value


def test_a_gap_that_is_allowed_takes_fewer_planes() -> None:
    matrix, choices, start = program(6, 12, 4, 60, 1)
    exact, loose = run(matrix, choices, start), run(matrix, choices, start, gap=0.3)
    assert loose.planes < exact.planes
    assert loose.value * 0.7 <= loose.bound <= exact.value == exact.bound


def test_the_search_branches_and_bounds_hold_on_the_way() -> None:
    matrix, choices, start = program(7, 10, 4, 12, 2)
    exact = run(matrix, choices, start)
    assert exact.planes > 20
    for seconds in (0.05, 0.2, 0.4):
        found = run(matrix, choices, start, seconds=seconds)
        assert found.bound <= exact.value * (1 + 1e-9) <= found.value * (1 + 2e-9)
