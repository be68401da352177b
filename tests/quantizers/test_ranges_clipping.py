from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxmpq.formats import NumberFormat, Scheme
from fxmpq.quantizers.floating import float_layout
from fxmpq.quantizers.ranges import kl, minmax, percentile, sigma

from .conftest import FLOATS, SHAPES, WIDTHS, affine, draw, ends, histogram_of


@given(FLOATS, st.sampled_from(WIDTHS))
def test_the_hundredth_percentile_is_min_max(values: list[float], bits: int) -> None:
    histogram, number_format = histogram_of(values), affine(bits)
    assert percentile(histogram, number_format, percentile=100.0) == minmax(
        histogram, number_format
    )


@pytest.mark.parametrize("share", [75.0, 99.0, 99.9])
@pytest.mark.parametrize("shape", ["normal", "relu", "shifted"])
def test_percentiles_are_numpys_to_a_bin_and_a_value(shape: str, share: float) -> None:
    values, number_format = draw(shape), affine(16)
    histogram = histogram_of(values)
    low, high = ends(percentile(histogram, number_format, percentile=share), number_format)
    slack = histogram.width + (high - low) / number_format.qmax
    # One value to either side: kinds of quantiles differ by that.
    below, above = np.quantile(values.numpy(), [share / 100 - 1e-4, share / 100 + 1e-4])
    assert max(below, 0.0) - slack <= high <= max(above, 0.0) + slack
    below, above = np.quantile(values.numpy(), [1 - share / 100 - 1e-4, 1 - share / 100 + 1e-4])
    assert min(below, 0.0) - slack <= low <= min(above, 0.0) + slack


def test_percentiles_are_nested() -> None:
    histogram, number_format = histogram_of(draw("heavy tail")), affine(8)
    reach = [
        percentile(histogram, number_format, percentile=share).scale
        for share in (60, 90, 99, 99.9, 99.99, 100)
    ]
    assert reach == sorted(reach)
    assert len(set(reach)) == 6


def test_a_percentile_of_zero_takes_the_whole_range() -> None:
    values = torch.zeros(1000)
    values[0] = 2.0
    found = percentile(histogram_of(values), affine(2), percentile=99.0)
    assert found == minmax(histogram_of(values), affine(2))


@pytest.mark.parametrize("shape", SHAPES)
def test_sigma_is_mean_and_deviation_within_the_whole_range(shape: str) -> None:
    values, number_format = draw(shape), affine(16)
    low, high = ends(sigma(histogram_of(values), number_format, k=2.0), number_format)
    mean, deviation = float(values.double().mean()), float(values.double().std(correction=0))
    step = (high - low) / number_format.qmax
    wanted_low = max(min(mean - 2 * deviation, 0.0), min(float(values.min()), 0.0))
    wanted_high = min(max(mean + 2 * deviation, 0.0), max(float(values.max()), 0.0))
    assert low == pytest.approx(wanted_low, abs=step)
    assert high == pytest.approx(wanted_high, abs=step)


def test_sigma_far_out_is_min_max() -> None:
    histogram = histogram_of(draw("normal"))
    assert sigma(histogram, affine(4), k=100.0) == minmax(histogram, affine(4))


def test_kl_clips_a_far_outlier_and_keeps_the_whole_of_even_values() -> None:
    number_format = affine(4)
    outlier = histogram_of(torch.cat([draw("normal"), torch.tensor([60.0])]))
    assert ends(kl(outlier, number_format), number_format)[1] < 8
    even = histogram_of(torch.linspace(0, 1, 20_001))
    assert kl(even, number_format).scale == pytest.approx(1 / 15, rel=0.06)


@settings(max_examples=25, deadline=None)
@given(
    spread=st.sampled_from(["normal", "background", "positive", "skewed"]),
    size=st.integers(1, 300),
    seed=st.integers(0, 99),
    number_format=st.sampled_from(
        [
            *(NumberFormat(bits, Scheme.AFFINE) for bits in (2, 3, 8)),
            NumberFormat(8, Scheme.E4M3),
            NumberFormat(8, Scheme.E5M2),
            NumberFormat(4, Scheme.E2M1),
        ]
    ),
)
def test_a_kl_range_does_not_reach_beyond_the_values(
    spread: str, size: int, seed: int, number_format: NumberFormat
) -> None:
    normal = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    values = {
        "normal": normal,
        "background": torch.cat([normal, torch.full((size,), -0.7)]),
        "positive": normal.abs(),
        "skewed": normal.exp() - 0.5,
    }[spread]
    found = kl(histogram_of(values), number_format)
    low, high = min(0.0, float(values.min())), max(0.0, float(values.max()))
    if number_format.is_integer:
        step = (0.5 + 1e-5 * number_format.qmax) * found.scale
        assert ends(found, number_format)[0] >= low - step
        assert ends(found, number_format)[1] <= high + step
    else:
        largest = float_layout(number_format.scheme).largest
        assert found.scale * largest <= max(-low, high) * (1 + 1e-6)


def test_exact_zeros_do_not_move_the_kl_range() -> None:
    values = draw("normal").relu()
    number_format = affine(4)
    few, many = histogram_of(values), histogram_of(torch.cat([values, torch.zeros(10**5)]))
    assert kl(many, number_format) == kl(few, number_format)
