from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxmpq.formats import NumberFormat
from fxmpq.granularity import PerBlock, PerChannel
from fxmpq.quantizers.scales import scale_shape, spread_scale
from fxmpq.targets.onnxruntime.blocks import (
    BLOCK_SIZES,
    dequantize_rows,
    kernel_block,
    pack_rows,
    scale_columns,
    unpack_rows,
)

WIDTHS = st.one_of(st.integers(1, 40).map(lambda blocks: 16 * blocks), st.integers(1, 300))
FORMATS = st.builds(
    lambda bits, size: NumberFormat(
        bits, granularity=PerChannel() if size is None else PerBlock(size)
    ),
    st.sampled_from([2, 4, 8]),
    st.sampled_from([None, *BLOCK_SIZES]),
)


@given(WIDTHS, FORMATS)
def test_a_kernel_block_divides_the_formats_own_and_the_rows(
    width: int, number_format: NumberFormat
) -> None:
    found = kernel_block(width, number_format)
    granularity = number_format.granularity
    shared = granularity.size if isinstance(granularity, PerBlock) else 256
    assert found in BLOCK_SIZES
    assert shared % found == 0
    better = [size for size in BLOCK_SIZES if shared % size == width % size == 0]
    assert found == max(better, default=16)


@given(WIDTHS, FORMATS, st.integers(1, 4), st.integers(0, 2**31))
def test_packed_rows_are_the_simulated_weight(
    width: int, number_format: NumberFormat, rows: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    low, high = number_format.qmin, number_format.qmax + 1
    codes = torch.randint(low, high, (rows, width), generator=generator).to(torch.int8)
    shape = scale_shape((rows, width), 0, number_format.granularity)
    scale = torch.rand(shape, generator=generator) + 0.1
    block = kernel_block(width, number_format)
    packed = pack_rows(codes, number_format.bits, block)
    stored = -(-width // block) * block
    assert packed.shape == (rows, stored * number_format.bits // 8)
    assert stored == width or width % 16
    assert torch.equal(unpack_rows(packed, number_format.bits, width), codes)
    spread = spread_scale(scale, (rows, width), 0, number_format.granularity)
    found = dequantize_rows(packed, scale.reshape(rows, -1), number_format.bits, block, width)
    assert torch.equal(found, codes * spread)


@given(st.integers(1, 200), st.sampled_from(BLOCK_SIZES), st.integers(0, 6))
def test_columns_are_those_of_the_scale_that_covers_a_block(
    width: int, block: int, doublings: int
) -> None:
    covered = block << doublings
    stored = -(-width // covered)
    starts = range(0, width, block)
    assert scale_columns(width, block, stored) == [start // covered for start in starts]


@pytest.mark.parametrize(("bits", "byte"), [(8, 0x80), (4, 0x88), (2, 0xAA)])
def test_zeros_and_what_is_filled_up_are_the_middle_code(bits: int, byte: int) -> None:
    packed = pack_rows(torch.zeros(2, 5, dtype=torch.int8), bits, 16)
    assert set(packed.flatten().tolist()) == {byte}
