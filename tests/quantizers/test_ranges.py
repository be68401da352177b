from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fxmpq.formats import NumberFormat, Precision
from fxmpq.quantizers.floating import fake_quantize_float
from fxmpq.quantizers.histogram import StreamingHistogram
from fxmpq.quantizers.integer import fake_quantize_activation
from fxmpq.quantizers.range_losses import lp_losses
from fxmpq.quantizers.ranges import RANGES, ActivationRange, minmax, mse

from .conftest import FLOATS, SHAPES, WIDTHS, affine, draw, ends, histogram_of


def error_of(values: Tensor, found: ActivationRange, number_format: NumberFormat) -> float:
    quantized = fake_quantize_activation(values, found.scale, found.zero_point, number_format)
    return float((quantized - values).double().square().sum())


def grid(low: float, high: float, number_format: NumberFormat) -> ActivationRange:
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / number_format.qmax
    zero_point = min(max(round(-low / scale), 0), number_format.qmax)
    return ActivationRange(scale, zero_point)


def histogram_loss(
    histogram: StreamingHistogram, found: ActivationRange, number_format: NumberFormat, p: float
) -> float:
    kept = histogram.counts > 0
    scale, zero_point = (
        torch.tensor([value], dtype=torch.float64) for value in (found.scale, found.zero_point)
    )
    values, counts = histogram.centres[kept], histogram.counts[kept]
    return float(lp_losses(values, counts, scale, zero_point, number_format, p))


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("shape", SHAPES)
def test_mse_is_no_worse_than_min_max_on_the_values(shape: str, bits: int) -> None:
    values, number_format = draw(shape), affine(bits)
    histogram = histogram_of(values)
    found = mse(histogram, number_format)
    whole = grid(float(values.min()), float(values.max()), number_format)
    # Values are known to half a bin.
    slack = len(values) * (histogram.width / 2) ** 2
    assert error_of(values, found, number_format) <= (
        error_of(values, whole, number_format) * 1.02 + slack
    )


@given(FLOATS, st.sampled_from(WIDTHS), st.sampled_from([0.5, 1.0, 2.0, 2.4, 4.0]))
def test_mse_is_never_worse_than_min_max_on_the_histogram(
    values: list[float], bits: int, p: float
) -> None:
    histogram, number_format = histogram_of(values), affine(bits)
    found = mse(histogram, number_format, p=p)
    loss = histogram_loss(histogram, found, number_format, p)
    assert loss <= histogram_loss(histogram, minmax(histogram, number_format), number_format, p)


@pytest.mark.parametrize("p", [1.0, 2.0, 2.4])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shape", ["normal", "relu", "heavy tail", "shifted"])
def test_mse_is_near_the_best_of_every_zero_point_and_a_fine_grid_of_scales(
    shape: str, bits: int, p: float
) -> None:
    """Brute force over the whole grid, on the histogram."""
    values, number_format = draw(shape, 1)[:3000], affine(bits)
    histogram = histogram_of(values)
    kept = histogram.counts > 0
    bins, counts = histogram.centres[kept], histogram.counts[kept]
    span = max(histogram.maximum, 0.0) - min(histogram.minimum, 0.0)
    scales = span / number_format.qmax * torch.exp2(-torch.arange(0, 61).double() / 10)
    zero_points = range(0, number_format.qmax + 1, max(number_format.qmax // 16, 1))
    if histogram.minimum >= 0:
        zero_points = range(1)
    best = min(
        float(lp_losses(bins, counts, scales, 0 * scales + zero, number_format, p).min())
        for zero in zero_points
    )
    found = mse(histogram, number_format, p=p)
    assert histogram_loss(histogram, found, number_format, p) <= best * 1.02


@pytest.mark.parametrize("rule", RANGES)
@given(one=FLOATS, bits=st.sampled_from(WIDTHS))
def test_zero_is_on_the_grid_and_the_zero_point_in_the_format(
    rule: str, one: list[float], bits: int
) -> None:
    number_format = affine(bits)
    found = RANGES[rule].find(histogram_of(one), number_format)
    assert found.scale > 0
    assert number_format.qmin <= found.zero_point <= number_format.qmax
    assert torch.tensor(found.scale, dtype=torch.float32).item() == found.scale
    if min(one) >= 0:
        assert found.zero_point == 0
    if max(one) <= 0 < -min(one):
        assert found.zero_point == number_format.qmax


@pytest.mark.parametrize("rule", RANGES)
@given(one=FLOATS, bits=st.sampled_from([2, 4, 8]), exponent=st.integers(-8, 8))
def test_a_scaled_tensor_has_a_scaled_range(
    rule: str, one: list[float], bits: int, exponent: int
) -> None:
    """`range(c x) = c range(x)`, bit for bit with powers of two."""
    values = torch.tensor(one, dtype=torch.float32)
    values[values.abs() < 1e-20] = 0.0
    found, scaled = (
        RANGES[rule].find(histogram_of(values * factor), affine(bits))
        for factor in (1.0, 2.0**exponent)
    )
    factor = 2.0**exponent if values.any() else 1.0
    assert scaled == ActivationRange(found.scale * factor, found.zero_point)


@pytest.mark.parametrize("rule", RANGES)
@pytest.mark.parametrize("shape", ["normal", "relu", "heavy tail"])
def test_the_order_of_values_does_not_matter(rule: str, shape: str) -> None:
    values = draw(shape)
    shuffled = values[torch.randperm(len(values), generator=torch.Generator().manual_seed(3))]
    found, other = (
        RANGES[rule].find(histogram_of(order), affine(4)) for order in (values, shuffled)
    )
    assert other.scale == pytest.approx(found.scale, rel=1e-6)
    assert other.zero_point == found.zero_point


@pytest.mark.parametrize("rule", RANGES)
def test_zeros_get_scale_one(rule: str) -> None:
    assert RANGES[rule].find(histogram_of(torch.zeros(7)), affine(8)) == ActivationRange(1.0, 0)


@pytest.mark.parametrize("rule", RANGES)
def test_denormal_ranges_have_a_step_that_is_not_zero(rule: str) -> None:
    assert RANGES[rule].find(histogram_of([0.0, 1e-44]), affine(8)).scale > 0


def test_few_codes_meet_a_frequent_value() -> None:
    """Half of an image is background: a code lies on it, though the range outgrows the values."""
    values = torch.cat([torch.full((10_000,), -0.81), torch.linspace(-0.81, 2.02, 10_000)])
    number_format = affine(4)
    found = mse(histogram_of(values), number_format)
    off = fake_quantize_activation(values[:1], found.scale, found.zero_point, number_format)
    assert abs(float(off) + 0.81) < 0.05 * found.scale
    assert ends(found, number_format)[1] > 2.1
    whole = error_of(values, minmax(histogram_of(values), number_format), number_format)
    assert error_of(values, found, number_format) < 0.6 * whole


def test_outliers_are_clipped_at_low_bits() -> None:
    values = torch.cat([draw("normal"), torch.tensor([30.0])])
    assert ends(mse(histogram_of(values), affine(2)), affine(2))[1] < 10


def test_a_larger_exponent_clips_less() -> None:
    histogram = histogram_of(draw("heavy tail"))
    scales = [mse(histogram, affine(4), p=p).scale for p in (1.0, 2.0, 3.0, 6.0)]
    assert scales == sorted(scales)
    assert scales[0] < scales[-1]


@pytest.mark.parametrize("rule", RANGES)
@pytest.mark.parametrize("name", ["we4m3ae4m3", "we4m3ae5m2", "we2m1ae2m1"])
def test_float_formats_have_a_scale_and_no_zero_point(rule: str, name: str) -> None:
    number_format = Precision.parse(name).activation
    assert number_format is not None
    values = draw("normal")
    found = RANGES[rule].find(histogram_of(values), number_format)
    assert found.zero_point == 0
    error = fake_quantize_float(values, found.scale, number_format) - values
    largest = {"we4m3ae4m3": 0.03, "we4m3ae5m2": 0.06, "we2m1ae2m1": 0.5}[name]
    assert float(error.norm() / values.norm()) < largest


@pytest.mark.parametrize("rule", RANGES)
@pytest.mark.parametrize("name", ["we4m3ae4m3", "we4m3ae5m2", "we2m1ae2m1", "w8a8", "w8a2"])
@pytest.mark.parametrize("value", [1.0, -0.1, 3e37])
def test_a_tensor_of_one_value_keeps_it(rule: str, name: str, value: float) -> None:
    number_format = Precision.parse(name).activation
    assert number_format is not None
    found = RANGES[rule].find(histogram_of([value] * 9), number_format)
    values = torch.full((9,), value)
    quantized = (
        fake_quantize_activation(values, found.scale, found.zero_point, number_format)
        if number_format.is_integer
        else fake_quantize_float(values, found.scale, number_format)
    )
    # The search meets the middle of a bin, half a 2048th of the range off.
    assert torch.allclose(quantized, values, rtol=1e-3)


def test_a_norm_beyond_double_precision_takes_the_whole_range() -> None:
    histogram = histogram_of([-1e3, 2e3])
    assert mse(histogram, affine(2), p=400.0) == minmax(histogram, affine(2))


@pytest.mark.parametrize("rule", RANGES)
@given(one=FLOATS, bits=st.sampled_from(WIDTHS))
def test_a_symmetric_range_has_its_zero_in_the_middle(
    rule: str, one: list[float], bits: int
) -> None:
    """And is the one of the values and their negatives, but for the smallest code."""
    number_format, half = affine(bits), 1 << (bits - 1)
    found = RANGES[rule].find(histogram_of(one), number_format, is_symmetric=True)
    assert found.zero_point == half
    assert torch.tensor(found.scale, dtype=torch.float32).item() == found.scale
    whole = minmax(histogram_of(one), number_format, is_symmetric=True)
    reach = max(max(one) / (half - 1), -min(one) / half)
    assert whole.scale == pytest.approx(reach or 1.0, rel=1e-6)
    assert 0 < found.scale <= whole.scale * 1.34


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_symmetric_mse_is_near_the_best_of_a_fine_grid_of_scales(shape: str, bits: int) -> None:
    values, number_format = draw(shape, 1)[:3000], affine(bits)
    histogram = histogram_of(values)
    whole = minmax(histogram, number_format, is_symmetric=True)
    best = min(
        histogram_loss(
            histogram,
            ActivationRange(whole.scale * 2.0 ** (-step / 10), 1 << (bits - 1)),
            number_format,
            2.0,
        )
        for step in range(61)
    )
    found = mse(histogram, number_format, is_symmetric=True)
    assert histogram_loss(histogram, found, number_format, 2.0) <= best * 1.02


@pytest.mark.parametrize("rule", RANGES)
@pytest.mark.parametrize("name", ["ae4m3", "ae5m2", "ae2m1"])
def test_floats_have_the_same_range_symmetric_or_not(rule: str, name: str) -> None:
    number_format = Precision.parse(name).activation
    histogram = histogram_of(draw("shifted") - 2.5)
    find = RANGES[rule].find
    assert find(histogram, number_format, is_symmetric=True) == find(histogram, number_format)
