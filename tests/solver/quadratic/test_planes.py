from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxmpq.solver.quadratic.planes import Choices, Quadratic, best_plane, tangent


def random_program(seed: int, sizes: tuple[int, ...], limits: int) -> tuple[Quadratic, Choices]:
    generator = np.random.default_rng(seed)
    options = sum(sizes)
    factor = generator.normal(size=(int(generator.integers(1, options + 2)), options))
    costs = generator.uniform(0, 2 / len(sizes), (limits, options))
    for start in np.concatenate([[0], np.cumsum(sizes)[:-1]]):
        costs[:, start] = 0
    function = Quadratic(factor.T @ factor, generator.normal(size=options), 0.5)
    return function, Choices(sizes, costs)


def value(function: Quadratic, point: np.ndarray) -> float:
    return float(point @ function.matrix @ point + function.linear @ point + function.constant)


def corners(choices: Choices) -> list[np.ndarray]:
    """Every choice within the limits, as a vector."""
    ranges = [
        range(start, start + size)
        for start, size in zip(choices.starts.tolist(), choices.sizes, strict=True)
    ]
    found = []
    for chosen in itertools.product(*ranges):
        point = np.zeros(sum(choices.sizes))
        point[list(chosen)] = 1
        if (choices.costs @ point <= 1).all():
            found.append(point)
    return found


programs = st.builds(
    random_program,
    st.integers(0, 10**6),
    st.lists(st.integers(1, 4), min_size=1, max_size=4).map(tuple),
    st.integers(0, 3),
)


@settings(max_examples=80, deadline=None)
@given(program=programs, seed=st.integers(0, 10**6))
def test_any_plane_bounds_every_choice_and_every_option(
    program: tuple[Quadratic, Choices], seed: int
) -> None:
    function, choices = program
    generator = np.random.default_rng(seed)
    point = generator.normal(size=len(function.linear))
    prices = generator.uniform(0, 5, len(choices.costs))
    best = best_plane(function, choices)
    for plane in (tangent(function, choices, point, prices), best):
        assert (plane.reduced >= 0).all()
        for corner in corners(choices):
            reached = value(function, corner)
            assert plane.bound + plane.reduced[corner == 1].max() <= reached + 1e-9
    assert best.bound >= tangent(function, choices, choices.even, 0 * prices).bound


@settings(max_examples=40, deadline=None)
@given(program=programs)
def test_the_best_plane_meets_the_relaxation_at_its_optimum(
    program: tuple[Quadratic, Choices],
) -> None:
    function, choices = program
    plane = best_plane(function, choices)
    point = plane.point
    assert np.add.reduceat(point, choices.starts) == pytest.approx(1, abs=1e-5)
    assert (point > -1e-6).all()
    assert (choices.costs @ point <= 1 + 1e-5).all()
    reached = value(function, point)
    assert plane.bound == pytest.approx(reached, abs=2e-5 * (1 + abs(reached)))


def test_the_relaxation_of_two_options_is_that_of_calculus() -> None:
    # (2 a - b)^2 with a + b = 1 is (3 a - 1)^2: zero at a third.
    function = Quadratic(np.array([[4.0, -2.0], [-2.0, 1.0]]), np.zeros(2), 0.0)
    plane = best_plane(function, Choices((2,), np.zeros((0, 2))))
    assert plane.point == pytest.approx([1 / 3, 2 / 3], abs=1e-3)
    assert plane.bound == pytest.approx(0, abs=1e-5)
    # At most a fifth of a: (3/5 - 1)^2.
    limited = best_plane(function, Choices((2,), np.array([[5.0, 0.0]])))
    assert limited.bound == pytest.approx(0.16, abs=1e-5)


def test_it_stops_as_soon_as_the_bound_is_enough() -> None:
    function, choices = random_program(1, (4, 4, 4, 4), 1)
    full = best_plane(function, choices)
    early = best_plane(function, choices, enough=full.bound - 1)
    assert full.bound - 1 <= early.bound < full.bound


def test_after_the_deadline_the_plane_at_even_shares_comes_back() -> None:
    function, choices = random_program(1, (4, 4, 4), 1)
    late = best_plane(function, choices, deadline=time.monotonic())
    assert np.array_equal(late.point, choices.even)
    assert late.bound < best_plane(function, choices).bound


def test_a_slack_lowers_the_bound() -> None:
    function, choices = random_program(2, (3, 3), 1)
    loose = Quadratic(function.matrix, function.linear, function.constant, slack=0.25)
    found = best_plane(loose, choices).bound
    assert found == pytest.approx(best_plane(function, choices).bound - 0.25)


def test_no_choice_within_the_limits_is_a_bound_without_end() -> None:
    function = Quadratic(np.eye(2), np.zeros(2), 0.0)
    plane = best_plane(function, Choices((2,), np.array([[2.0, 3.0]])), enough=100)
    assert plane.bound >= 100


def test_options_that_leave_too_little_for_the_others_do_not_fit() -> None:
    choices = Choices((2, 2), np.array([[0.0, 0.7, 0.2, 0.5], [0.1, 0.1, 0.1, 0.95]]))
    assert choices.room().tolist() == [True, True, True, False]
    exact = Choices((1, 2), np.array([[0.1 + 0.2, 0.7, 0.0]]))
    assert exact.room().all()


def test_parts_keep_what_is_left_of_every_group() -> None:
    choices = Choices((2, 3), np.arange(5.0)[None])
    part = choices.only(np.array([True, False, False, True, True]))
    assert part is not None
    assert (part.sizes, part.costs.tolist()) == ((1, 2), [[0.0, 3.0, 4.0]])
    assert choices.only(np.array([True, True, False, False, False])) is None
    function = Quadratic(np.arange(25.0).reshape(5, 5), np.arange(5.0), 1.0, 0.1)
    fewer = function.only(np.array([1, 4]))
    assert fewer.matrix.tolist() == [[6.0, 9.0], [21.0, 24.0]]
    assert (fewer.linear.tolist(), fewer.constant, fewer.slack) == ([1.0, 4.0], 1.0, 0.1)
