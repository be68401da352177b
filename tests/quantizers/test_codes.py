from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxmpq.formats import NumberFormat, Precision
from fxmpq.quantizers.codes import code_dtype, dequantize, nearest_codes, round_in_place
from fxmpq.quantizers.integer import per_channel
from fxmpq.quantizers.packing import pack_codes, unpack_codes

WIDTHS = st.sampled_from([2, 3, 4, 5, 6, 7, 8, 16])
SCALES = st.floats(2.0**-13, 10, width=32)
TENSORS = st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=30).map(torch.tensor)

NAMES = ["w2", "w4", "w8", "w16", "we4m3", "we5m2", "we2m1"]
DTYPES = {"w2": torch.int8, "w8": torch.int8, "w16": torch.int16, "we2m1": torch.uint8}


def weight_format(name: str) -> NumberFormat:
    found = Precision.parse(name).weight
    assert found is not None
    return found


def drawn(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(5, 40, generator=generator)
    return weight, torch.rand(5, 1, generator=generator) * 0.5 + 0.01


@pytest.mark.parametrize("name", DTYPES)
def test_codes_are_held_in_small_integers(name: str) -> None:
    number_format = weight_format(name)
    assert code_dtype(number_format) is DTYPES[name]
    codes = nearest_codes(*drawn(0), number_format)
    assert codes.dtype is DTYPES[name]
    assert int(codes.min()) >= number_format.qmin
    assert int(codes.max()) <= number_format.qmax


@given(st.sampled_from(NAMES), st.integers(0, 1000))
def test_values_of_codes_are_the_weight_rounded(name: str, seed: int) -> None:
    number_format = weight_format(name)
    weight, scale = drawn(seed)
    codes = nearest_codes(weight, scale, number_format)
    expected = round_in_place(weight / scale, number_format) * scale
    assert torch.equal(dequantize(codes, scale, number_format), expected)
    assert torch.equal(nearest_codes(expected, scale, number_format), codes)


@given(st.sampled_from(NAMES), st.integers(0, 1000))
def test_packed_codes_come_back(name: str, seed: int) -> None:
    number_format = weight_format(name)
    codes = nearest_codes(*drawn(seed), number_format)
    packed = pack_codes(codes, number_format.bits)
    back = unpack_codes(packed, number_format.bits, (5, 40), signed=number_format.is_integer)
    assert back.dtype is codes.dtype
    assert torch.equal(back, codes)


@pytest.mark.parametrize(
    ("name", "dtype"), [("we4m3", "float8_e4m3fn"), ("we2m1", "float4_e2m1fn")]
)
def test_a_float_weight_is_what_ml_dtypes_makes_of_it(name: str, dtype: str) -> None:
    number_format = weight_format(name)
    weight, scale = drawn(3)
    largest = {"we4m3": 448.0, "we2m1": 6.0}[name]
    scaled = (weight / scale).clamp(-largest, largest).numpy()
    expected = scaled.astype(getattr(ml_dtypes, dtype)).astype(np.float32) * scale.numpy()
    codes = nearest_codes(weight, scale, number_format)
    assert np.array_equal(dequantize(codes, scale, number_format).numpy(), expected)


@pytest.mark.parametrize("name", NAMES)
def test_rounding_in_place_changes_the_tensor(name: str) -> None:
    values = torch.tensor([0.3, 1e30])
    found = round_in_place(values, weight_format(name))
    assert found is values
    assert float(values[1]) < 1e30


@given(TENSORS, SCALES, WIDTHS)
def test_codes_lie_in_the_format(weight: torch.Tensor, scale: float, bits: int) -> None:
    number_format = NumberFormat(bits)
    codes = nearest_codes(weight, torch.tensor(scale), number_format)
    assert codes.dtype is (torch.int8 if bits <= 8 else torch.int16)
    assert int(codes.min()) >= number_format.qmin
    assert int(codes.max()) <= number_format.qmax


@given(TENSORS, SCALES, WIDTHS)
def test_inside_the_range_the_error_is_at_most_half_a_step(
    weight: torch.Tensor, scale: float, bits: int
) -> None:
    number_format = NumberFormat(bits)
    inside = weight.clamp(number_format.qmin * scale, number_format.qmax * scale)
    step = torch.tensor(scale)
    back = dequantize(nearest_codes(inside, step, number_format), step, number_format)
    assert float((back - inside).abs().max()) <= scale / 2 * (1 + 1e-5) + 1e-5


@given(TENSORS, SCALES, WIDTHS)
def test_quantizing_twice_changes_nothing(weight: torch.Tensor, scale: float, bits: int) -> None:
    number_format, step = NumberFormat(bits), torch.tensor(scale)
    codes = nearest_codes(weight, step, number_format)
    again = nearest_codes(dequantize(codes, step, number_format), step, number_format)
    assert again.equal(codes)


@pytest.mark.parametrize("axis", [0, 1, 3])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_weights_agree_with_torchs_fake_quantization(axis: int, bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    weight = torch.randn(4, 6, 3, 5, generator=generator)
    scale = torch.rand(weight.shape[axis], generator=generator) + 0.05
    number_format = NumberFormat(bits)
    expected = torch.fake_quantize_per_channel_affine(
        weight,
        scale,
        torch.zeros(len(scale), dtype=torch.int32),
        axis,
        number_format.qmin,
        number_format.qmax,
    )
    spread = per_channel(scale, weight.dim(), axis)
    codes = nearest_codes(weight, spread, number_format)
    assert torch.allclose(dequantize(codes, spread, number_format), expected, atol=1e-6)


def test_rounding_is_half_to_even() -> None:
    codes = nearest_codes(torch.tensor([[0.5, 1.5, 2.5, -0.5]]), torch.ones(()), NumberFormat(8))
    assert codes.tolist() == [[0, 2, 2, 0]]
