from __future__ import annotations

import itertools

import mip
import numpy as np
import pytest

from fxmpq.solver.branch import Cover
from fxmpq.solver.instance import Instance, Option
from fxmpq.solver.pair_model import branch_pairs
from fxmpq.solver.pair_reduction import reduce_pairs
from fxmpq.solver.pairs import Pair, PairedInstance

SOLVERS = ("cbc", "highs")


def random_program(seed: int, groups: int = 5, options: int = 3) -> PairedInstance:
    generator = np.random.default_rng(seed)

    def number(most: int) -> int:
        return int(generator.integers(0, most))

    keys = itertools.count()
    made = tuple(
        tuple(Option(next(keys), number(40), (number(9), number(9))) for _ in range(options))
        for _ in range(groups)
    )
    pairs = tuple(
        Pair(
            left,
            right,
            {
                (a.key, b.key): (number(20), number(5), 0)
                for a, b in itertools.product(made[left], made[right])
            },
        )
        for left, right in [(0, 1), (1, 2), (2, 3), (3, 4), (0, 3)]
    )
    return PairedInstance(Instance(made, (28, 20)), pairs)


def every(paired: PairedInstance) -> list[list[int]]:
    keys = ([option.key for option in group] for group in paired.instance.groups)
    return [list(found) for found in itertools.product(*keys)]


def best(paired: PairedInstance) -> int:
    return min(paired.totals(keys)[0] for keys in every(paired) if paired.is_met_by(keys))


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("seed", range(6))
def test_it_is_the_optimum_of_enumeration(solver: str, seed: int) -> None:
    reduced = reduce_pairs(random_program(seed))
    assert reduced is not None
    found = branch_pairs(reduced, [], solver=solver, seconds=30, unit=100)
    assert found.chosen is not None
    assert found.complete
    keys = [option.key for option in found.chosen]
    assert reduced.is_met_by(keys)
    assert reduced.totals(keys)[0] == best(reduced)
    value = reduced.instance.constant + found.bound * 100
    assert value == pytest.approx(best(reduced), abs=1e-4)


@pytest.mark.parametrize("solver", SOLVERS)
def test_covers_are_kept_and_count_what_is_settled(solver: str) -> None:
    reduced = reduce_pairs(random_program(1))
    assert reduced is not None
    found = branch_pairs(reduced, [], solver=solver, seconds=30, unit=100)
    assert found.chosen is not None
    keys = frozenset(option.key for option in found.chosen)
    cover = Cover(keys, len(keys) - 1)
    other = branch_pairs(reduced, [cover], solver=solver, seconds=30, unit=100)
    assert other.chosen is not None
    assert len(keys & {option.key for option in other.chosen}) < len(keys)
    settled = PairedInstance(
        Instance(reduced.instance.groups, reduced.instance.limits, settled=(99,)), reduced.pairs
    )
    none = branch_pairs(settled, [Cover(frozenset({99}), 0)], solver=solver, seconds=30, unit=100)
    assert (none.chosen, none.complete) == (None, True)


def test_pairs_that_no_limit_has_room_for_are_left_out() -> None:
    """All but one combination exceeds a limit of 0."""
    groups = ((Option(0, 0, (0,)), Option(1, 2, (0,))), (Option(2, 0, (0,)), Option(3, 3, (0,))))
    entries = {(0, 2): (0, 4), (0, 3): (0, 4), (1, 2): (0, 4), (1, 3): (1, 0)}
    paired = PairedInstance(Instance(groups, (0,)), (Pair(0, 1, entries),))
    found = branch_pairs(paired, [], solver="cbc", seconds=30, unit=10)
    assert found.chosen is not None
    assert [option.key for option in found.chosen] == [1, 3]
    assert found.bound * 10 == pytest.approx(6)


def test_no_time_and_no_solution_are_told_apart() -> None:
    paired = random_program(0)
    late = branch_pairs(paired, [], solver="cbc", seconds=0, unit=10)
    assert (late.chosen, late.complete) == (None, False)
    tight = PairedInstance(Instance(paired.instance.groups, (1, 1)), paired.pairs)
    none = branch_pairs(tight, [], solver="cbc", seconds=30, unit=10)
    assert (none.chosen, none.complete) == (None, True)


def test_a_cover_of_what_is_gone_binds_nothing() -> None:
    reduced = reduce_pairs(random_program(2))
    assert reduced is not None
    free = branch_pairs(reduced, [], solver="cbc", seconds=30, unit=100)
    cover = Cover(frozenset({990, 991}), 1)
    assert branch_pairs(reduced, [cover], solver="cbc", seconds=30, unit=100) == free


def test_a_solver_that_ends_without_an_answer_has_proven_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def late(self: mip.Model, **limits: float) -> mip.OptimizationStatus:
        return mip.OptimizationStatus.NO_SOLUTION_FOUND

    monkeypatch.setattr(mip.Model, "optimize", late)
    found = branch_pairs(random_program(0), [], solver="cbc", seconds=30, unit=10)
    assert (found.chosen, found.complete, found.bound) == (None, False, 0.0)
