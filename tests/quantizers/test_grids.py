from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from fxmpq.formats import NumberFormat, Precision, Scheme
from fxmpq.quantizers.grids import grids, middle_code
from fxmpq.quantizers.integer import fake_quantize_activation

WIDTHS = st.sampled_from([2, 3, 4, 6, 8, 16])
ENDS = st.tuples(st.floats(-1e4, -1e-3) | st.just(0.0), st.floats(1e-3, 1e4) | st.just(0.0)).filter(
    lambda ends: ends[0] < ends[1]
)


def grid_of(
    ends: tuple[float, float], number_format: NumberFormat, is_symmetric: bool
) -> tuple[float, int]:
    low, high = torch.tensor([ends], dtype=torch.float64).T
    scale, zero_point = grids(low, high, number_format, is_symmetric)
    return float(scale), int(zero_point)


@given(ENDS, WIDTHS)
def test_a_symmetric_grid_is_that_of_signed_codes_and_reaches_both_ends(
    ends: tuple[float, float], bits: int
) -> None:
    number_format, half = NumberFormat(bits, Scheme.AFFINE), 1 << (bits - 1)
    scale, zero_point = grid_of(ends, number_format, True)
    assert zero_point == middle_code(number_format) == half
    reached = (-half * scale, (half - 1) * scale)
    # A scale is rounded to float32.
    assert reached[0] <= ends[0] * (1 - 1e-7) + 1e-30
    assert reached[1] >= ends[1] * (1 - 1e-7)
    # A smaller one would miss an end.
    assert reached[0] * (1 - 1e-6) >= ends[0] or reached[1] * (1 - 1e-6) <= ends[1]


@given(ENDS, WIDTHS)
def test_a_symmetric_grid_holds_the_affine_one_to_one_code(
    ends: tuple[float, float], bits: int
) -> None:
    number_format, half = NumberFormat(bits, Scheme.AFFINE), 1 << (bits - 1)
    step, zero_point = grid_of(ends, number_format, False)
    scale, _ = grid_of(ends, number_format, True)
    assert scale >= step * (1 - 1e-6)
    # Rounding its zero point moves an affine grid by half a step.
    assert -half * scale <= -zero_point * step + step
    assert (half - 1) * scale >= (number_format.qmax - zero_point) * step - step


@given(st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=20), ENDS, WIDTHS)
def test_values_round_as_signed_codes_do(
    values: list[float], ends: tuple[float, float], bits: int
) -> None:
    x = torch.tensor(values)
    scale, zero_point = grid_of(ends, NumberFormat(bits, Scheme.AFFINE), True)
    found = fake_quantize_activation(x, scale, zero_point, NumberFormat(bits, Scheme.AFFINE))
    signed = NumberFormat(bits)
    codes = torch.fake_quantize_per_tensor_affine(x, scale, 0, signed.qmin, signed.qmax)
    assert torch.equal(found, codes)


@given(ENDS, st.sampled_from(["ae4m3", "ae5m2", "ae2m1"]))
def test_floats_have_one_grid(ends: tuple[float, float], name: str) -> None:
    number_format = Precision.parse(name).activation
    assert number_format is not None
    assert grid_of(ends, number_format, True) == grid_of(ends, number_format, False)
    assert grid_of(ends, number_format, True)[1] == middle_code(number_format) == 0
