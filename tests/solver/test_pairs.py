from __future__ import annotations

import pytest
from hypothesis import assume, given

from fxmpq.solver.instance import Instance, Option
from fxmpq.solver.pairs import Pair, PairedInstance, classes, pair_cover, pair_rows

from .conftest import every_choice, paired_programs

# Two groups of two, which take 5 of the limit together unless they agree.
UNLIKE = PairedInstance(
    Instance(
        (
            (Option(0, 0, (1,)), Option(1, 3, (0,))),
            (Option(2, 0, (2,)), Option(3, 1, (0,))),
        ),
        (4,),
        constant=10,
    ),
    (Pair(0, 1, {(0, 2): (0, 0), (0, 3): (7, 5), (1, 2): (7, 5), (1, 3): (0, 0)}),),
)


def test_totals_count_options_and_pairs() -> None:
    assert UNLIKE.totals([0, 2]) == (10, 3)
    assert UNLIKE.totals([3, 0]) == (10 + 1 + 7, 1 + 5)
    assert UNLIKE.is_met_by([0, 2])
    assert not UNLIKE.is_met_by([0, 3])


def test_options_that_a_pair_treats_alike_are_one_class() -> None:
    group = tuple(Option(key, 0, (0,)) for key in range(3))
    entries = {(key, other): (0, int(key == 2) * other) for key in range(3) for other in (3, 4)}
    pair = Pair(0, 1, entries)
    assert classes(0, group, pair) == [[0, 1], [2]]
    assert classes(1, [Option(3, 0, (0,)), Option(4, 0, (0,))], pair) == [[3], [4]]
    assert pair_rows(1, [3], [pair]) == {3: [(0, (0, 0)), (1, (0, 0)), (2, (0, 3))]}
    assert pair_rows(5, [3], [pair]) == {3: []}


def test_the_cover_of_a_conflict_names_both_ends() -> None:
    cover = pair_cover(UNLIKE, [0, 3])
    assert (cover.keys, cover.most) == (frozenset({0, 3}), 1)


@given(paired_programs(least_rows=1))
def test_a_cover_cuts_off_its_choice_and_none_that_is_met(paired: PairedInstance) -> None:
    exceeding = [keys for keys in every_choice(paired) if not paired.is_met_by(keys)]
    assume(exceeding)
    for keys in exceeding[:10]:
        cover = pair_cover(paired, keys)
        assert len(cover.keys & set(keys)) > cover.most
        for other in every_choice(paired):
            if paired.is_met_by(other):
                assert len(cover.keys & set(other)) <= cover.most


def test_there_is_no_cover_of_a_choice_within_the_limits() -> None:
    with pytest.raises(StopIteration):
        pair_cover(UNLIKE, [0, 2])
