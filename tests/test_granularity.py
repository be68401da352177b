from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxmpq.errors import PrecisionError
from fxmpq.granularity import (
    Dynamic,
    Granularity,
    PerBlock,
    PerChannel,
    PerTensor,
    dynamic_suffix,
    granularity_suffix,
    read_dynamic,
)

granularities = st.sampled_from([PerTensor(), PerChannel()]) | st.builds(
    PerBlock, st.integers(2, 4096)
)


@given(granularities, granularities)
def test_suffixes_tell_granularities_apart(one: Granularity, other: Granularity) -> None:
    assert (granularity_suffix(one) == granularity_suffix(other)) == (one == other)
    assert len({one, dataclasses.replace(one)}) == 1


@pytest.mark.parametrize("dynamic", [None, *Dynamic])
def test_what_a_suffix_says_is_read_back(dynamic: Dynamic | None) -> None:
    assert read_dynamic(dynamic_suffix(dynamic)) is dynamic


def test_no_match_is_no_dynamic_range() -> None:
    assert read_dynamic(None) is None


@pytest.mark.parametrize("size", [1, 0, -32])
def test_blocks_hold_at_least_two_values(size: int) -> None:
    assert PerBlock(2).size == 2
    with pytest.raises(PrecisionError, match=f"a block of {size} values .* smallest block is 2"):
        PerBlock(size)
