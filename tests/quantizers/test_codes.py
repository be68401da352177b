from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxmpq.formats import NumberFormat, Precision
from fxmpq.quantizers.codes import code_dtype, dequantize, nearest_codes, round_in_place
from fxmpq.quantizers.packing import pack_codes, unpack_codes

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
