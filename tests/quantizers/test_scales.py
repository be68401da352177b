from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxmpq.formats import NumberFormat, Precision
from fxmpq.granularity import Granularity, PerBlock, PerChannel, PerTensor
from fxmpq.quantizers.scales import (
    e4m3_tensor_scale,
    pack_scale,
    round_to_e4m3_scale,
    scale_rows,
    scale_shape,
    spread_scale,
    storable_scale,
    storable_scale_above,
    unpack_scale,
)

shapes = st.lists(st.integers(1, 7), min_size=1, max_size=4).map(tuple)
granularities = st.sampled_from([PerTensor(), PerChannel()]) | st.builds(
    PerBlock, st.integers(2, 40)
)
positive = st.lists(st.floats(2.0**-100, 2.0**100, width=32), min_size=1, max_size=20)


def weight_format(name: str) -> NumberFormat:
    found = Precision.parse(name).weight
    assert found is not None
    return found


MX, NV = weight_format("we2m1b32"), weight_format("we2m1b16")


@given(st.data(), shapes, granularities)
def test_every_value_meets_the_scale_of_its_row(
    data: st.DataObject, shape: tuple[int, ...], granularity: Granularity
) -> None:
    axis = data.draw(st.integers(0, len(shape) - 1))
    wanted = scale_shape(shape, axis, granularity)
    scale = torch.arange(1.0, 1 + math.prod(wanted)).reshape(wanted)
    spread = spread_scale(scale, shape, axis, granularity).expand(shape)
    rows = scale_rows(spread, axis, granularity)
    assert rows.shape[0] == scale.numel()
    # What fills a short block up is zero; all else is the row's own scale.
    assert bool(((rows == scale.reshape(-1, 1)) | (rows == 0)).all())
    assert int((rows > 0).sum()) == math.prod(shape)


@given(st.integers(1, 5), st.integers(1, 30), st.integers(2, 12))
def test_blocks_are_consecutive_input_values(channels: int, inputs: int, size: int) -> None:
    weight = torch.arange(channels * inputs).reshape(channels, inputs)
    blocks = [block for row in weight.tolist() for block in _cut(row, size)]
    rows = scale_rows(weight, 0, PerBlock(size))
    assert [row[: len(block)].tolist() for row, block in zip(rows, blocks, strict=True)] == blocks
    assert scale_shape((channels, inputs), 0, PerBlock(size)) == (channels, -(-inputs // size))


def _cut(row: list[int], size: int) -> list[list[int]]:
    return [row[start : start + size] for start in range(0, len(row), size)]


def test_a_kernel_is_flattened_with_its_inputs() -> None:
    weight = torch.arange(2 * 3 * 2 * 2).reshape(2, 3, 2, 2)
    assert scale_rows(weight, 0, PerBlock(8)).tolist()[:2] == [
        [0, 1, 2, 3, 4, 5, 6, 7],
        [8, 9, 10, 11, 0, 0, 0, 0],
    ]


@given(positive)
def test_power_of_two_scales_are_the_nearest_in_ratio_and_torchs(drawn: list[float]) -> None:
    scale = torch.tensor(drawn, dtype=torch.float32)
    found = storable_scale(scale, MX)
    mantissa, _ = np.frexp(found.numpy())
    assert np.array_equal(mantissa, np.full(len(drawn), 0.5, dtype=np.float32))
    ratio = (found.double() / scale.double()).log2().abs()
    assert float(ratio.max()) <= 0.5 + 1e-7
    packed = pack_scale(found, MX)
    assert set(packed) == {"scale"}
    torchs = found.to(torch.float8_e8m0fnu).view(torch.uint8)
    assert torch.equal(packed["scale"], torchs)
    mls = found.numpy().astype(ml_dtypes.float8_e8m0fnu).view(np.uint8)
    assert np.array_equal(packed["scale"].numpy(), mls)
    assert torch.equal(unpack_scale(packed, MX), found)


def test_all_powers_of_two_that_float32_holds_are_kept() -> None:
    scale = torch.tensor([2.0**exponent for exponent in range(-126, 128)])
    assert torch.equal(storable_scale(scale, MX), scale)
    assert torch.equal(unpack_scale(pack_scale(scale, MX), MX), scale)
    extremes = storable_scale(torch.tensor([1e-45, 3.4e38]), MX)
    assert extremes.tolist() == [2.0**-126, 2.0**127]


@given(positive)
def test_e4m3_scales_are_a_tensor_scale_times_ml_dtypes_numbers(drawn: list[float]) -> None:
    scale = torch.tensor(drawn, dtype=torch.float32)
    found = storable_scale(scale, NV)
    packed = pack_scale(found, NV)
    assert (packed["scale"].dtype, packed["tensor_scale"].shape) == (torch.uint8, (1,))
    numbers = packed["scale"].numpy().view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    assert np.array_equal(numbers * packed["tensor_scale"].numpy(), found.numpy())
    assert torch.equal(unpack_scale(packed, NV), found)
    assert torch.equal(storable_scale(found, NV), found)
    # A 4-bit significand is within a sixteenth, unless a scale is far below the largest.
    large = scale > scale.max() * 2.0**-14
    assert bool(((found / scale)[large] - 1).abs().max() <= 1 / 16)
    assert bool((found > 0).all())


@given(st.floats(2.0**-90, 2.0**100, width=32))
def test_the_tensor_scale_is_the_smallest_power_of_two_that_reaches(largest: float) -> None:
    found = float(e4m3_tensor_scale(torch.tensor([largest, largest / 3])))
    assert math.frexp(found)[0] == 0.5
    assert 448 * found / 2 < largest <= 448 * found


def test_e4m3_scales_saturate_at_both_ends() -> None:
    found = round_to_e4m3_scale(torch.tensor([1e9, 1e-9, 3.0]), torch.tensor(2.0))
    assert found.tolist() == [896.0, 2.0**-8, 3.0]


@given(positive, st.sampled_from(["w4", "w4t", "w4b32", "we4m3", "we2m1b64"]))
def test_float32_scales_stay(drawn: list[float], name: str) -> None:
    scale = torch.tensor(drawn, dtype=torch.float32)
    number_format = weight_format(name)
    assert storable_scale(scale, number_format) is scale
    assert unpack_scale(pack_scale(scale, number_format), number_format) is scale


@pytest.mark.parametrize("name", ["w4b32", "we2m1b32", "we2m1b16"])
def test_a_weight_of_no_values_has_no_scales(name: str) -> None:
    number_format = weight_format(name)
    shape = scale_shape((0, 4), 0, number_format.granularity)
    assert shape[0] == 0
    assert storable_scale(torch.zeros(shape), number_format).numel() == 0


@given(positive, st.sampled_from([MX, NV]))
def test_a_scale_rounded_up_is_the_smallest_that_is_not_below(
    drawn: list[float], number_format: NumberFormat
) -> None:
    scale = torch.tensor(drawn)
    found = storable_scale_above(scale, number_format)
    assert bool((found >= scale).all())
    assert torch.equal(storable_scale(found, number_format), found)
    if number_format is MX:
        assert bool((found / 2 < scale).all())
        return
    numbers = torch.arange(1, 127).to(torch.uint8).view(torch.float8_e4m3fn).float()
    stored = numbers * e4m3_tensor_scale(scale)
    expected = torch.stack([stored[stored >= entry].amin() for entry in scale])
    assert torch.equal(found, expected)


def test_float32_scales_are_their_own_bounds() -> None:
    assert torch.equal(
        storable_scale_above(torch.tensor([0.3]), NumberFormat(4)), torch.tensor([0.3])
    )
