from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxmpq.formats import NumberFormat, Scheme
from fxmpq.quantizers.histogram import StreamingHistogram
from fxmpq.quantizers.integer import fake_quantize_activation
from fxmpq.quantizers.ranges import ActivationRange, mse_activation_range

WIDTHS = [2, 3, 4, 6, 8, 16]
SHAPES = {
    "normal": lambda g: torch.randn(20_000, generator=g),
    "relu": lambda g: torch.randn(20_000, generator=g).relu(),
    "negative": lambda g: -torch.rand(20_000, generator=g) - 0.5,
    "shifted": lambda g: torch.randn(20_000, generator=g) * 0.1 + 3,
    "heavy tail": lambda g: torch.randn(20_000, generator=g) ** 5,
    "two values": lambda g: torch.randint(0, 2, (20_000,), generator=g) * 3.0 - 1,
}


def histogram_of(values: torch.Tensor) -> StreamingHistogram:
    histogram = StreamingHistogram()
    histogram.update(values)
    return histogram


def error_of(values: torch.Tensor, found: ActivationRange, number_format: NumberFormat) -> float:
    quantized = fake_quantize_activation(values, found.scale, found.zero_point, number_format)
    return float((quantized - values).double().square().sum())


def grid(low: float, high: float, number_format: NumberFormat) -> ActivationRange:
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / number_format.qmax
    zero_point = min(max(round(-low / scale), 0), number_format.qmax)
    return ActivationRange(scale, zero_point)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_range_is_no_worse_than_min_max(shape: str, bits: int) -> None:
    values = SHAPES[shape](torch.Generator().manual_seed(0))
    number_format = NumberFormat(bits, Scheme.AFFINE)
    found = mse_activation_range(histogram_of(values), number_format)
    whole = grid(float(values.min()), float(values.max()), number_format)
    step = whole.scale
    # Values are known to a histogram bin: 1/2048 of the span, or one step at 16 bits.
    slack = len(values) * min(step, float(values.max() - values.min()) / 1024) ** 2 / 4
    assert error_of(values, found, number_format) <= (
        error_of(values, whole, number_format) * 1.02 + (slack if bits > 8 else 1e-9)
    )


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shape", ["normal", "relu", "heavy tail", "shifted"])
def test_the_range_is_near_the_best_of_a_fine_grid(shape: str, bits: int) -> None:
    values = SHAPES[shape](torch.Generator().manual_seed(1))[:4000]
    number_format = NumberFormat(bits, Scheme.AFFINE)
    found = error_of(
        values, mse_activation_range(histogram_of(values), number_format), number_format
    )
    low, high = float(values.min()), float(values.max())
    ratios = torch.exp2(-torch.arange(0, 30) / 6).tolist()
    best = min(
        error_of(values, grid(low * r, high * s, number_format), number_format)
        for r in (ratios if low < 0 else [0.0])
        for s in ratios
    )
    assert found <= best * 1.03


@given(st.floats(-100, 100, width=32), st.floats(-100, 100, width=32), st.sampled_from(WIDTHS))
def test_zero_is_on_the_grid_and_the_zero_point_in_the_format(
    one: float, other: float, bits: int
) -> None:
    number_format = NumberFormat(bits, Scheme.AFFINE)
    found = mse_activation_range(histogram_of(torch.tensor([one, other])), number_format)
    assert found.scale > 0
    assert number_format.qmin <= found.zero_point <= number_format.qmax
    assert torch.tensor(found.scale, dtype=torch.float32).item() == found.scale
    if min(one, other) >= 0:
        assert found.zero_point == 0


def test_values_that_are_never_positive_use_the_top_as_zero() -> None:
    number_format = NumberFormat(8, Scheme.AFFINE)
    found = mse_activation_range(histogram_of(-torch.rand(1000)), number_format)
    assert found.zero_point == number_format.qmax


def test_zeros_get_scale_one() -> None:
    found = mse_activation_range(histogram_of(torch.zeros(7)), NumberFormat(8, Scheme.AFFINE))
    assert found == ActivationRange(1.0, 0)


def test_denormal_ranges_have_a_step_that_is_not_zero() -> None:
    found = mse_activation_range(
        histogram_of(torch.tensor([0.0, 1e-44])), NumberFormat(8, Scheme.AFFINE)
    )
    assert found.scale > 0


def test_outliers_are_clipped_at_low_bits() -> None:
    values = torch.cat([torch.randn(10_000), torch.tensor([30.0])])
    number_format = NumberFormat(2, Scheme.AFFINE)
    found = mse_activation_range(histogram_of(values), number_format)
    assert found.scale * number_format.qmax < 10
