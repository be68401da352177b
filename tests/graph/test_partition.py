from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxmpq.graph.partition import partition

PAIRS = st.integers(1, 12).flatmap(
    lambda size: st.tuples(
        st.just(size),
        st.lists(st.tuples(st.integers(0, size - 1), st.integers(0, size - 1)), max_size=15),
    )
)


def reachable(size: int, pairs: list[tuple[int, int]], start: int) -> set[int]:
    """All that pairs lead to, one step after another."""
    found = {start}
    for _ in range(size):
        found |= {b for a, b in pairs if a in found} | {a for a, b in pairs if b in found}
    return found


@given(PAIRS)
def test_a_class_is_what_pairs_lead_to(drawn: tuple[int, list[tuple[int, int]]]) -> None:
    size, pairs = drawn
    classes = partition(size, pairs)
    assert sorted(index for members in classes for index in members) == list(range(size))
    assert classes == sorted(classes)
    for members in classes:
        assert members == sorted(reachable(size, pairs, members[0]))


def test_without_pairs_everything_stands_alone() -> None:
    assert partition(3, []) == [[0], [1], [2]]
    assert partition(0, []) == []


def test_long_chains_are_one() -> None:
    assert partition(5000, ((i, i + 1) for i in range(4999))) == [list(range(5000))]
    assert partition(5000, ((i + 1, i) for i in reversed(range(4999)))) == [list(range(5000))]


def test_what_is_not_there_is_an_error() -> None:
    with pytest.raises(IndexError):
        partition(2, [(0, 2)])
