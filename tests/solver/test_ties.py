from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxmpq.errors import FxmpqError
from fxmpq.solver.ties import merge_ties, smallest

GROUPS = [f"g{index}" for index in range(6)]
TABLE = {group: {"w4a8": index, "w8a8": 10 - 3 * index} for index, group in enumerate(GROUPS)}


@given(ties=st.lists(st.lists(st.sampled_from(GROUPS), max_size=3), max_size=4))
def test_units_are_the_connected_groups_in_order(ties: list[list[str]]) -> None:
    units, names = merge_ties(TABLE, ties)
    label = {group: index for index, group in enumerate(GROUPS)}
    for _ in GROUPS:
        for tie in ties:
            for group in tie:
                label[group] = min(label[member] for member in tie)
    expected: dict[int, list[str]] = {}
    for group in GROUPS:
        expected.setdefault(label[group], []).append(group)
    assert units == list(expected.values())
    assert names == [["w4a8", "w8a8"]] * len(units)


def test_tied_groups_keep_the_precisions_they_share() -> None:
    table = {"a": {"w2a8": 0, "w8a8": 0, "w4a8": 0}, "b": {"w4a8": 0, "w8a8": 0}}
    assert merge_ties(table, [("b", "a")]) == ([["a", "b"]], [["w8a8", "w4a8"]])


def test_tied_groups_that_share_nothing_are_named_with_what_they_have() -> None:
    with pytest.raises(FxmpqError, match="'a' has w2a8; 'b' has w8a8"):
        merge_ties({"a": {"w2a8": 0}, "b": {"w8a8": 0}}, [("a", "b")])


def test_a_tie_to_an_unknown_group_shows_the_closest() -> None:
    with pytest.raises(FxmpqError, match="'conv2', which is no group; closest: 'conv1'"):
        merge_ties({"conv1": {"w8a8": 0}}, [("conv1", "conv2")])


def test_ties_raise_the_smallest_sum() -> None:
    table = {"a": {"w4a8": 0.1, "w8a8": 5}, "b": {"w4a8": 9, "w8a8": 0.2}}
    assert smallest(table, []) == 0.3
    assert smallest(table, [("a", "b")]) == 5.2
