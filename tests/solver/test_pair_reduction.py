from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fxmpq.solver.instance import Instance, Option
from fxmpq.solver.pair_reduction import reduce_pairs, split_pairs
from fxmpq.solver.pairs import Pair, PairedInstance

from .conftest import every_choice, paired_programs


@given(paired_programs())
def test_splitting_changes_no_total_and_bounds_without_the_pairs(paired: PairedInstance) -> None:
    split = split_pairs(paired)
    alone = PairedInstance(split.instance, ())
    for keys in every_choice(paired):
        assert split.totals(keys) == paired.totals(keys)
        both = zip(alone.totals(keys), paired.totals(keys), strict=True)
        assert all(own <= total for own, total in both)
    for pair in split.pairs:
        for side, place in enumerate((pair.left, pair.right)):
            for option in split.instance.groups[place]:
                rows = [terms for ends, terms in pair.entries.items() if ends[side] == option.key]
                assert {min(column) for column in zip(*rows, strict=True)} == {0}


@given(paired_programs(), st.none() | st.integers(-5, 20))
def test_the_optimum_is_kept(paired: PairedInstance, ceiling: int | None) -> None:
    reduced = reduce_pairs(paired, ceiling)
    fitting = [paired.totals(keys)[0] for keys in every_choice(paired) if paired.is_met_by(keys)]
    worth = [value for value in fitting if ceiling is None or value <= ceiling]
    if reduced is None:
        assert not worth
        return
    settled = reduced.instance.settled
    found = [
        (paired.totals([*settled, *keys])[0], reduced.totals(keys)[0])
        for keys in every_choice(reduced)
        if reduced.is_met_by(keys)
    ]
    # What is left has the values and the limits of what it was.
    assert all(before == after for before, after in found)
    assert all(
        reduced.is_met_by(keys) == paired.is_met_by([*settled, *keys])
        for keys in every_choice(reduced)
    )
    if worth:
        assert min(value for value, _ in found) == min(worth)


@given(paired_programs())
def test_what_is_left_is_normal(paired: PairedInstance) -> None:
    reduced = reduce_pairs(paired)
    if reduced is None:
        return
    for group in reduced.instance.groups:
        assert len(group) > 1
        columns = zip(*[(option.value, *option.costs) for option in group], strict=True)
        assert {min(column) for column in columns} == {0}
        assert all(
            cost <= limit
            for option in group
            for cost, limit in zip(option.costs, reduced.instance.limits, strict=True)
        )
    # Each limit can be exceeded, if only by options and pairs that exclude each other.
    for row, limit in enumerate(reduced.instance.limits):
        most = sum(max(o.costs[row] for o in group) for group in reduced.instance.groups)
        most += sum(max(t[row + 1] for t in pair.entries.values()) for pair in reduced.pairs)
        assert most > limit
    assert all(any(map(any, pair.entries.values())) for pair in reduced.pairs)


def test_a_pair_that_is_a_sum_of_its_ends_is_none() -> None:
    groups = (
        (Option(0, 0, (0,)), Option(1, 0, (4,))),
        (Option(2, 0, (0,)), Option(3, 0, (0,))),
    )
    own = {0: 2, 1: 5, 2: 1, 3: 0}
    entries = {(a, b): (own[a] + own[b], 0) for a in (0, 1) for b in (2, 3)}
    paired = PairedInstance(Instance(groups, (9,)), (Pair(0, 1, entries),))
    reduced = reduce_pairs(paired)
    assert reduced is not None
    assert reduced.pairs == ()
    assert (reduced.instance.settled, reduced.instance.constant) == ((0, 3), 2)


def test_an_option_that_only_a_neighbour_makes_worth_having_is_kept() -> None:
    """Alone the second option is worse; with the third it saves the pair."""
    groups = ((Option(0, 0, ()), Option(1, 1, ())), (Option(2, 0, ()), Option(3, 0, ())))
    entries = {(0, 2): (0,), (0, 3): (5,), (1, 2): (5,), (1, 3): (0,)}
    paired = PairedInstance(Instance(groups, ()), (Pair(0, 1, entries),))
    reduced = reduce_pairs(paired)
    assert reduced is not None
    assert [len(group) for group in reduced.instance.groups] == [2, 2]
    # No solution of value 0 takes it.
    reduced = reduce_pairs(paired, 0)
    assert reduced is not None
    assert 0 in reduced.instance.settled
