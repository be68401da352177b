from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxmpq.solver.quadratic import convexity
from fxmpq.solver.quadratic.convexity import best_blocks, convexified, difference_basis
from fxmpq.solver.quadratic.planes import Choices, best_plane


def program(
    seed: int, sizes: tuple[int, ...], rank: int | None = None
) -> tuple[np.ndarray, Choices]:
    generator = np.random.default_rng(seed)
    options = sum(sizes)
    factor = generator.normal(size=(rank or options, options)) * 10 ** generator.uniform(
        -2, 0, options
    )
    return factor.T @ factor, Choices(sizes, np.zeros((0, options)))


def corners(sizes: tuple[int, ...]) -> list[np.ndarray]:
    units = [np.eye(size) for size in sizes]
    return [np.concatenate(found) for found in itertools.product(*units)]


def lift(blocks: np.ndarray, point: np.ndarray) -> float:
    """How much moving the blocks raises the function at a point."""
    return float(blocks.diagonal() @ point - point @ blocks @ point)


sizes = st.lists(st.integers(1, 4), min_size=1, max_size=4).map(tuple)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), shape=sizes, rank=st.none() | st.integers(1, 3))
def test_the_convex_form_equals_the_function_at_every_choice(
    seed: int, shape: tuple[int, ...], rank: int | None
) -> None:
    matrix, choices = program(seed, shape, rank)
    blocks = best_blocks(matrix, choices, choices.even)
    found = convexified(matrix, blocks, choices)
    scale = float(np.trace(matrix))
    lowest = np.linalg.eigvalsh(found.matrix)[0]
    assert lowest >= -1e-9 * scale
    assert found.slack == pytest.approx(2 * len(shape) * max(-lowest, 0), abs=1e-12 * scale)
    for corner in corners(shape):
        here = corner @ found.matrix @ corner + found.linear @ corner + found.constant
        assert here == pytest.approx(corner @ matrix @ corner, abs=1e-9 * scale)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), shape=sizes)
def test_nothing_is_moved_between_groups(seed: int, shape: tuple[int, ...]) -> None:
    matrix, choices = program(seed, shape)
    blocks = best_blocks(matrix, choices, choices.even)
    across = choices.group[:, None] != choices.group
    assert np.abs(blocks[across]).max(initial=0) <= 1e-12 * np.trace(matrix)


def test_without_interactions_everything_is_moved_and_the_relaxation_is_exact() -> None:
    matrix = np.diag([3.0, 1.0, 2.0, 5.0, 4.0])
    choices = Choices((2, 3), np.zeros((0, 5)))
    as_given = best_plane(convexified(matrix, np.zeros_like(matrix), choices), choices)
    blocks = best_blocks(matrix, choices, choices.even)
    moved = best_plane(convexified(matrix, blocks, choices), choices)
    assert as_given.bound < 2
    assert moved.bound == pytest.approx(3, rel=1e-2)


def test_the_relaxation_gets_much_better_and_stays_below_the_optimum() -> None:
    matrix, choices = program(3, (3,) * 6)
    least = min(corner @ matrix @ corner for corner in corners(choices.sizes))
    bounds = [best_plane(convexified(matrix, 0 * matrix, choices), choices).bound]
    blocks, before = best_blocks(matrix, choices, choices.even), None
    for _ in range(3):
        plane = best_plane(convexified(matrix, blocks, choices), choices)
        bounds.append(plane.bound)
        before = blocks
        blocks = best_blocks(matrix, choices, np.maximum(plane.point, 0.05), before=before)
    assert max(bounds) <= least * (1 + 1e-9)
    assert least - max(bounds) < 0.6 * (least - bounds[0])


def test_a_point_that_lifts_is_lifted_most() -> None:
    matrix, choices = program(4, (2, 2, 2))

    points = [np.array([0.5, 0.5, 0.99, 0.01, 0.99, 0.01]), choices.even]
    first, second = (best_blocks(matrix, choices, point) for point in points)
    assert lift(first, points[0]) > lift(second, points[0])
    assert lift(second, points[1]) > lift(first, points[1])


def test_a_b_from_before_that_is_too_large_is_not_used() -> None:
    matrix, choices = program(5, (3, 3))
    again = best_blocks(matrix, choices, choices.even, before=10 * matrix)
    assert again == pytest.approx(best_blocks(matrix, choices, choices.even))


def test_many_unknowns_are_sought_on_the_diagonal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, choices = program(6, (4,) * 5)
    full = best_blocks(matrix, choices, choices.even)
    monkeypatch.setattr(convexity, "_MOST_UNKNOWNS", 10)
    fewer = best_blocks(matrix, choices, choices.even)
    for blocks in (full, fewer):
        assert convexified(matrix, blocks, choices).slack <= 1e-9 * np.trace(matrix)
    assert 0 < lift(fewer, choices.even) < lift(full, choices.even)


def test_after_the_deadline_a_valid_b_comes_back_at_once() -> None:
    matrix, choices = program(7, (4,) * 10)
    blocks = best_blocks(matrix, choices, choices.even, deadline=time.monotonic() - 1)
    found = convexified(matrix, blocks, choices)
    assert found.slack <= 1e-9 * np.trace(matrix)


def test_what_does_not_differ_within_groups_has_nothing_to_move() -> None:
    choices = Choices((2, 2), np.zeros((0, 4)))
    assert not best_blocks(np.ones((4, 4)), choices, choices.even).any()
    single = Choices((1, 1), np.zeros((0, 2)))
    assert not best_blocks(np.eye(2), single, single.even).any()
    assert convexified(np.eye(2), np.zeros((2, 2)), single).constant == 2


@given(shape=sizes)
def test_differences_are_orthonormal_and_sum_to_nothing_in_every_group(
    shape: tuple[int, ...],
) -> None:
    basis = difference_basis(shape)
    assert basis.T @ basis == pytest.approx(np.eye(sum(shape) - len(shape)), abs=1e-12)
    starts = np.concatenate([[0], np.cumsum(shape)[:-1]])
    assert np.abs(np.add.reduceat(basis, starts, axis=0)).max(initial=0) < 1e-12


def test_one_option_a_group_needs_no_numbers() -> None:
    choices = Choices((1, 1, 1), np.zeros((0, 3)))
    found = convexified(np.full((3, 3), 2.0), np.zeros((3, 3)), choices)
    assert (found.constant, found.linear.tolist(), found.slack) == (18.0, [0.0] * 3, 0.0)
    assert not found.matrix.any()
