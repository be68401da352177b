from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxmpq.errors import PrecisionError
from fxmpq.granularity import Granularity, PerBlock, PerChannel, PerTensor, granularity_suffix

granularities = st.sampled_from([PerTensor(), PerChannel()]) | st.builds(
    PerBlock, st.integers(2, 4096)
)


@given(granularities, granularities)
def test_suffixes_tell_granularities_apart(one: Granularity, other: Granularity) -> None:
    assert (granularity_suffix(one) == granularity_suffix(other)) == (one == other)
    assert len({one, dataclasses.replace(one)}) == 1


@pytest.mark.parametrize("size", [1, 0, -32])
def test_blocks_hold_at_least_two_values(size: int) -> None:
    assert PerBlock(2).size == 2
    with pytest.raises(PrecisionError, match=f"a block of {size} values .* smallest block is 2"):
        PerBlock(size)
