from __future__ import annotations

import itertools

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from fxmpq.solver.instance import Instance, Option
from fxmpq.solver.pairs import Pair, PairedInstance, classes, pair_cover, pair_rows


@st.composite
def programs(draw: st.DrawFn) -> PairedInstance:
    sizes = draw(st.lists(st.integers(1, 4), min_size=2, max_size=4))
    rows = draw(st.integers(1, 2))
    keys = itertools.count()
    number = st.integers(0, 5)
    groups = tuple(
        tuple(
            Option(next(keys), draw(st.integers(-3, 5)), tuple(draw(number) for _ in range(rows)))
            for _ in range(size)
        )
        for size in sizes
    )
    pairs = []
    ends = st.sampled_from(list(itertools.combinations(range(len(sizes)), 2)))
    for left, right in draw(st.lists(ends, max_size=3, unique=True)):
        entry = st.tuples(*[number for _ in range(rows + 1)])
        entries = {(a.key, b.key): draw(entry) for a in groups[left] for b in groups[right]}
        pairs.append(Pair(left, right, entries))
    limits = tuple(draw(st.integers(0, 25)) for _ in range(rows))
    instance = Instance(groups, limits, constant=draw(st.integers(-2, 2)))
    return PairedInstance(instance, tuple(pairs))


def every(paired: PairedInstance) -> list[list[int]]:
    keys = ([option.key for option in group] for group in paired.instance.groups)
    return [list(found) for found in itertools.product(*keys)]


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


@given(programs())
def test_a_cover_cuts_off_its_choice_and_none_that_is_met(paired: PairedInstance) -> None:
    exceeding = [keys for keys in every(paired) if not paired.is_met_by(keys)]
    assume(exceeding)
    for keys in exceeding[:10]:
        cover = pair_cover(paired, keys)
        assert len(cover.keys & set(keys)) > cover.most
        for other in every(paired):
            if paired.is_met_by(other):
                assert len(cover.keys & set(other)) <= cover.most


def test_there_is_no_cover_of_a_choice_within_the_limits() -> None:
    with pytest.raises(StopIteration):
        pair_cover(UNLIKE, [0, 2])
