from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxmpq.formats import NumberFormat, Scheme
from fxmpq.quantizers.floating import (
    exponent_of,
    fake_quantize_float,
    float_codes,
    float_layout,
    float_values,
    power_of_two,
    round_to_float,
)

SCHEMES = [Scheme.E4M3, Scheme.E5M2, Scheme.E2M1]
BITS = {Scheme.E4M3: 8, Scheme.E5M2: 8, Scheme.E2M1: 4}
TORCH = {Scheme.E4M3: torch.float8_e4m3fn, Scheme.E5M2: torch.float8_e5m2}
ML = {
    Scheme.E4M3: ml_dtypes.float8_e4m3fn,
    Scheme.E5M2: ml_dtypes.float8_e5m2,
    Scheme.E2M1: ml_dtypes.float4_e2m1fn,
}
schemes = st.sampled_from(SCHEMES)
numbers = st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=30)


def many(scheme: Scheme) -> torch.Tensor:
    """Random bit patterns of finite float32, and numbers at and around every tie and grid point."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randint(-(2**31), 2**31, (200_000,), generator=generator).to(torch.int32)
    drawn = patterns.view(torch.float32)
    spread = torch.randn(100_000, generator=generator) * torch.exp2(
        torch.randint(-20, 20, (100_000,), generator=generator).float()
    )
    values = float_values(torch.arange(1 << BITS[scheme], dtype=torch.uint8), scheme)
    grid = values[values.isfinite()].unique()
    ties = (grid[:-1] + grid[1:]) / 2
    exact = torch.cat([grid, ties])
    around = [torch.nextafter(exact, torch.tensor(end)) for end in (-torch.inf, torch.inf)]
    found = torch.cat([drawn[drawn.isfinite()], spread, exact, *around])
    return torch.cat([found, torch.tensor([0.0, -0.0])])


def within(x: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    largest = float_layout(scheme).largest
    return x.clamp(-largest, largest)


@pytest.mark.parametrize("scheme", [Scheme.E4M3, Scheme.E5M2])
def test_codes_are_torchs_bit_for_bit(scheme: Scheme) -> None:
    x = many(scheme)
    expected = within(x, scheme).to(TORCH[scheme]).view(torch.uint8)
    assert torch.equal(float_codes(x, scheme), expected)
    assert torch.equal(round_to_float(x, scheme), within(x, scheme).to(TORCH[scheme]).float())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_codes_are_those_of_ml_dtypes_bit_for_bit(scheme: Scheme) -> None:
    x = many(scheme)
    rounded = within(x, scheme).numpy().astype(ML[scheme])
    assert np.array_equal(float_codes(x, scheme).numpy(), rounded.view(np.uint8))
    values = round_to_float(x, scheme).numpy()
    assert np.array_equal(values, rounded.astype(np.float32))
    assert np.array_equal(np.signbit(values), np.signbit(rounded.astype(np.float32)))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_bit_pattern_has_the_value_of_ml_dtypes(scheme: Scheme) -> None:
    codes = np.arange(1 << BITS[scheme], dtype=np.uint8)
    expected = codes.view(ML[scheme]).astype(np.float32)
    found = float_values(torch.from_numpy(codes), scheme).numpy()
    assert np.array_equal(found, expected, equal_nan=True)
    if scheme in TORCH:
        torchs = torch.from_numpy(codes).view(TORCH[scheme]).float()
        assert np.array_equal(found, torchs.numpy(), equal_nan=True)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_finite_codes_survive_a_round_trip(scheme: Scheme) -> None:
    codes = torch.arange(1 << BITS[scheme], dtype=torch.uint8)
    values = float_values(codes, scheme)
    kept = codes[values.isfinite()]
    assert torch.equal(float_codes(values[values.isfinite()], scheme), kept)
    assert float(values[values.isfinite()].max()) == float_layout(scheme).largest


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("x", [1e9, 3e38, torch.inf])
def test_overflow_saturates(scheme: Scheme, x: float) -> None:
    largest = float_layout(scheme).largest
    assert round_to_float(torch.tensor([x, -x]), scheme).tolist() == [largest, -largest]
    found = float_values(float_codes(torch.tensor([x, -x]), scheme), scheme)
    assert found.tolist() == [largest, -largest]


@given(schemes, numbers)
def test_rounding_finds_a_nearest_number(scheme: Scheme, drawn: list[float]) -> None:
    x = torch.tensor(drawn, dtype=torch.float32)
    grid = float_values(torch.arange(1 << BITS[scheme], dtype=torch.uint8), scheme)
    grid = grid[grid.isfinite()].double()
    nearest = (within(x, scheme).double()[:, None] - grid).abs().amin(dim=1)
    found = (round_to_float(x, scheme).double() - within(x, scheme).double()).abs()
    assert torch.equal(found, nearest)


@given(schemes, numbers)
def test_rounding_keeps_order_signs_and_its_own_results(scheme: Scheme, drawn: list[float]) -> None:
    x = torch.tensor(drawn, dtype=torch.float32).sort().values
    rounded = round_to_float(x, scheme)
    assert bool((rounded.diff() >= 0).all())
    assert torch.equal(round_to_float(-x, scheme), -rounded)
    assert torch.equal(round_to_float(rounded, scheme), rounded)


def test_nan_stays_and_double_precision_is_taken() -> None:
    found = round_to_float(torch.tensor([torch.nan, 1.26], dtype=torch.float64), Scheme.E2M1)
    assert found.isnan().tolist() == [True, False]
    assert found.dtype is torch.float32
    assert float(found[1]) == 1.5


def test_powers_of_two_are_exact() -> None:
    exponents = torch.arange(-126, 128)
    found = power_of_two(exponents)
    assert found.tolist() == [2.0**exponent for exponent in exponents.tolist()]
    assert torch.equal(exponent_of(found), exponents.to(torch.int32))
    assert torch.equal(
        exponent_of(torch.nextafter(2 * found[:-1], torch.zeros(()))), exponent_of(found[:-1])
    )


@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_activation_is_scaled_rounded_and_scaled_back(scheme: Scheme) -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(1)) * 3
    number_format = NumberFormat(BITS[scheme], scheme)
    scale = 4.0 / float_layout(scheme).largest
    found = fake_quantize_float(x, scale, number_format)
    scaled = (x / scale).clamp(-float_layout(scheme).largest, float_layout(scheme).largest)
    expected = scaled.numpy().astype(ML[scheme]).astype(np.float32) * np.float32(scale)
    assert np.array_equal(found.numpy(), expected)


def test_gradients_pass_inside_the_range() -> None:
    x = torch.tensor([-7.0, -3.0, 0.2, 2.9, 3.1], requires_grad=True)
    number_format = NumberFormat(4, Scheme.E2M1)
    found = fake_quantize_float(x, 0.5, number_format)
    assert torch.equal(found.detach(), fake_quantize_float(x.detach(), 0.5, number_format))
    (found * torch.arange(1.0, 6.0)).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0.0, 2.0, 3.0, 4.0, 0.0]
