from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxmpq.solver.quadratic import descent
from fxmpq.solver.quadratic.descent import descended, restarted, value
from fxmpq.solver.quadratic.planes import Choices


def program(seed: int, groups: int = 5, size: int = 3) -> tuple[np.ndarray, Choices, np.ndarray]:
    """A program whose first options fit together."""
    generator = np.random.default_rng(seed)
    options = groups * size
    factor = generator.normal(size=(options, options))
    costs = generator.uniform(0, 2 / groups, (2, options))
    costs[:, ::size] = 0.5 / groups
    return factor.T @ factor, Choices((size,) * groups, costs), np.arange(0, options, size)


def fits(choices: Choices, chosen: np.ndarray) -> bool:
    return bool((choices.costs[:, chosen].sum(axis=1) <= 1 + 1e-12).all())


def neighbours(choices: Choices, chosen: np.ndarray, groups: int) -> list[np.ndarray]:
    """Choices that differ in so many groups at most."""
    found = []
    for places in itertools.combinations(range(len(chosen)), groups):
        ranges = [
            range(choices.starts[place], choices.starts[place] + choices.sizes[place])
            for place in places
        ]
        for options in itertools.product(*ranges):
            other = chosen.copy()
            other[list(places)] = options
            found.append(other)
    return [other for other in found if fits(choices, other)]


def test_the_value_is_the_quadratic_form() -> None:
    matrix, _, chosen = program(0)
    point = np.zeros(len(matrix))
    point[chosen] = 1
    assert value(matrix, chosen) == pytest.approx(point @ matrix @ point)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_no_exchange_of_two_improves_what_comes_back(seed: int) -> None:
    matrix, choices, start = program(seed)
    before = start.copy()
    found = descended(matrix, choices, start)
    assert np.array_equal(start, before)
    assert fits(choices, found)
    least = min(value(matrix, other) for other in neighbours(choices, found, 2))
    assert value(matrix, found) <= least + 1e-9
    assert value(matrix, found) <= value(matrix, start) + 1e-9


def test_large_programs_exchange_one_group_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(descent, "_PAIRED", 3)
    for seed in range(5):
        matrix, choices, start = program(seed)
        found = descended(matrix, choices, start)
        least = min(value(matrix, other) for other in neighbours(choices, found, 1))
        assert value(matrix, found) <= least + 1e-9


def test_a_limit_that_is_full_leaves_exchanges_at_equal_cost() -> None:
    shares = np.array([[0.1, 0.1, 0.2, 0.2, 0.7, 0.7]])
    matrix = np.diag([2.0, 1.0, 2.0, 1.0, 2.0, 1.0])
    found = descended(matrix, Choices((2, 2, 2), shares), np.array([0, 2, 4]))
    assert found.tolist() == [1, 3, 5]


def test_restarts_are_no_worse_and_reproducible() -> None:
    better = 0
    for seed in range(10):
        matrix, choices, start = program(seed, groups=8, size=4)
        once = descended(matrix, choices, start)
        often = restarted(matrix, choices, start, restarts=20, deadline=np.inf)
        again = restarted(matrix, choices, start, restarts=20, deadline=np.inf)
        assert fits(choices, often)
        assert np.array_equal(often, again)
        assert value(matrix, often) <= value(matrix, once)
        better += value(matrix, often) < value(matrix, once)
    assert better > 0


def test_restarts_end_at_the_deadline() -> None:
    matrix, choices, start = program(1, groups=8, size=4)
    late = restarted(matrix, choices, start, restarts=10**9, deadline=time.monotonic())
    assert np.array_equal(late, descended(matrix, choices, start))


def test_a_start_that_is_the_only_choice_comes_back() -> None:
    matrix = np.eye(4)
    choices = Choices((2, 2), np.array([[1.0, 2.0, 0.0, 2.0]]))
    found = restarted(matrix, choices, np.array([0, 2]), restarts=5, deadline=np.inf)
    assert found.tolist() == [0, 2]


def test_restarts_that_cannot_be_repaired_are_dropped() -> None:
    # Anything but the first options is too much, and takes several groups to repair.
    size, groups = 3, 60
    costs = np.full((1, size * groups), 0.9)
    costs[:, ::size] = 1 / groups
    start = np.arange(0, size * groups, size)
    matrix = np.diag(np.where(np.arange(size * groups) % size, 1.0, 2.0))
    found = restarted(matrix, Choices((size,) * groups, costs), start, restarts=10, deadline=np.inf)
    assert np.array_equal(found, start)
