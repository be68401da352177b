from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxmpq.formats import NumberFormat, Precision
from fxmpq.quantizers.codes import dequantize, nearest_codes
from fxmpq.quantizers.floating import float_layout
from fxmpq.quantizers.integer import per_channel
from fxmpq.quantizers.modules import WeightQuantizer
from fxmpq.quantizers.scales import scale_rows, scale_shape
from fxmpq.quantizers.weight_scale import (
    WEIGHT_SCALES,
    minmax_weight_scales,
    mse_weight_scales,
)

WIDTHS = [2, 3, 4, 5, 6, 7, 8, 16]


def errors(weight: torch.Tensor, scale: torch.Tensor, number_format: NumberFormat) -> torch.Tensor:
    spread = per_channel(scale, weight.dim(), 0)
    codes = nearest_codes(weight, spread, number_format)
    return (dequantize(codes, spread, number_format) - weight).double().square().sum(dim=1)


def brute_force(weight: torch.Tensor, number_format: NumberFormat) -> torch.Tensor:
    """The least error per channel over 800 scales of a geometric grid, on the exact weights."""
    step = weight.abs().amax(dim=1) / 2 ** (number_format.bits - 1)
    ratios = torch.exp2(torch.linspace(-2, 1, 800)).tolist()
    found = [errors(weight, step * ratio, number_format) for ratio in ratios]
    return torch.stack(found).amin(dim=0)


def weights(shape: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(12, 1000, generator=generator)
    return {"normal": normal, "laplace": normal * normal.abs(), "one sided": normal.abs()}[shape]


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("shape", ["normal", "laplace", "one sided"])
def test_scales_are_within_percents_of_brute_force(shape: str, bits: int) -> None:
    weight, number_format = weights(shape), NumberFormat(bits)
    (scale,) = mse_weight_scales(weight, [number_format], 0)
    found, best = errors(weight, scale, number_format), brute_force(weight, number_format)
    assert float((found / best).max()) < 1.15
    assert float(found.sum() / best.sum()) < 1.04


@pytest.mark.parametrize("bits", WIDTHS)
def test_scales_are_no_worse_than_the_largest_magnitude(bits: int) -> None:
    weight, number_format = weights("normal"), NumberFormat(bits)
    (scale,) = mse_weight_scales(weight, [number_format], 0)
    peak = weight.abs().amax(dim=1) / number_format.qmax
    found = errors(weight, scale, number_format).sum()
    assert float(found / errors(weight, peak, number_format).sum()) < 1.01


def test_low_widths_gain_much_over_the_largest_magnitude() -> None:
    weight, number_format = weights("normal"), NumberFormat(3)
    (scale,) = mse_weight_scales(weight, [number_format], 0)
    peak = weight.abs().amax(dim=1) / number_format.qmax
    found = errors(weight, scale, number_format).sum()
    assert float(found / errors(weight, peak, number_format).sum()) < 0.5


def test_sixteen_bits_use_the_whole_width() -> None:
    weight = weights("normal")
    (scale,) = mse_weight_scales(weight, [NumberFormat(16)], 0)
    codes = nearest_codes(weight, per_channel(scale, weight.dim(), 0), NumberFormat(16))
    assert codes.abs().amax(dim=1).tolist() == [32767] * 12


def test_formats_are_found_together_as_alone() -> None:
    weight = weights("laplace")
    formats = [NumberFormat(bits) for bits in WIDTHS]
    together = mse_weight_scales(weight, formats, 0)
    for number_format, scale in zip(formats, together, strict=True):
        (alone,) = mse_weight_scales(weight, [number_format], 0)
        assert scale.equal(alone)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_channels_of_any_axis(axis: int) -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(4, 5, 6, generator=generator)
    (scale,) = mse_weight_scales(weight, [NumberFormat(4)], axis)
    rows = weight.movedim(axis, 0).flatten(1)
    (expected,) = mse_weight_scales(rows, [NumberFormat(4)], 0)
    assert scale.shape == (weight.shape[axis],)
    assert torch.allclose(scale, expected)


def test_scales_follow_the_channel() -> None:
    generator = torch.Generator().manual_seed(4)
    row = torch.randn(1, 500, generator=generator)
    factors = torch.tensor([1.0, 4.0, 0.125])
    (scale,) = mse_weight_scales(row * factors[:, None], [NumberFormat(4)], 0)
    assert torch.allclose(scale / scale[0], factors)


def test_zeros_and_vanishing_channels_have_positive_scales() -> None:
    weight = torch.tensor([[0.0, 0.0], [1e-44, -1e-44], [1.0, -1.0]])
    for scale in mse_weight_scales(weight, [NumberFormat(2), NumberFormat(8), NumberFormat(16)], 0):
        assert float(scale[0]) == 1.0
        assert float(scale.min()) > 0


def test_more_channels_than_are_searched_at_once() -> None:
    weight = torch.randn(5000, 8, generator=torch.Generator().manual_seed(5))
    (scale,) = mse_weight_scales(weight, [NumberFormat(4)], 0)
    (last,) = mse_weight_scales(weight[4990:], [NumberFormat(4)], 0)
    assert scale[4990:].equal(last)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_far_outlier_does_not_widen_a_long_channel(bits: int) -> None:
    """The best scale lies far below a quarter of what would reach the outlier."""
    weight = torch.randn(4, 20_000, generator=torch.Generator().manual_seed(6))
    weight[:, 0] = 60.0
    number_format = NumberFormat(bits)
    (scale,) = mse_weight_scales(weight, [number_format], 0)
    step = weight.abs().amax(dim=1) / 2 ** (bits - 1)
    trials = [step * ratio for ratio in torch.exp2(torch.linspace(-6, 1, 400)).tolist()]
    best = torch.stack([errors(weight, trial, number_format) for trial in trials]).amin(dim=0)
    assert float((errors(weight, scale, number_format) / best).max()) < 1.002


@pytest.mark.parametrize("size", [3, 9, 25])
@pytest.mark.parametrize("bits", [2, 4, 6, 8])
def test_short_channels_come_near_brute_force(size: int, bits: int) -> None:
    weight = torch.randn(40, size, generator=torch.Generator().manual_seed(size))
    (scale,) = mse_weight_scales(weight, [NumberFormat(bits)], 0)
    found, best = errors(weight, scale, NumberFormat(bits)), brute_force(weight, NumberFormat(bits))
    assert float(found.sum() / best.sum()) < 1.02


@given(
    st.lists(st.lists(st.floats(-9, 9, width=32), min_size=4, max_size=4), min_size=1, max_size=5),
    st.sampled_from([2, 3, 4, 8]),
    st.sampled_from([1.0, 2.0, 2.4, 4.0]),
)
def test_no_channel_is_worse_than_without_clipping(
    rows: list[list[float]], bits: int, p: float
) -> None:
    weight, number_format = torch.tensor(rows), NumberFormat(bits)
    (scale,) = mse_weight_scales(weight, [number_format], 0, p=p)
    (whole,) = minmax_weight_scales(weight, [number_format], 0)
    found, limit = (
        (dequantize(nearest_codes(weight, s, number_format), s, number_format) - weight)
        .abs()
        .pow(p)
        for s in (scale.unsqueeze(1), whole.unsqueeze(1))
    )
    # Scales are found on channels divided by their peaks, whose rounding may differ.
    slack = 1e-4 * limit.sum(dim=1) + 1e-5 * weight.abs().amax(dim=1) ** p
    assert (found.sum(dim=1) <= limit.sum(dim=1) + slack).all()


@given(
    st.lists(st.lists(st.floats(-9, 9, width=32), min_size=4, max_size=4), min_size=1, max_size=5),
    st.sampled_from(WIDTHS),
)
def test_minmax_clips_nothing_and_is_the_smallest_that_does(
    rows: list[list[float]], bits: int
) -> None:
    weight, number_format = torch.tensor(rows), NumberFormat(bits)
    (scale,) = minmax_weight_scales(weight, [number_format], 0)
    units = weight / scale[:, None]
    assert (units.amax(dim=1) <= number_format.qmax * (1 + 1e-6)).all()
    assert (units.amin(dim=1) >= number_format.qmin * (1 + 1e-6)).all()
    reaches = torch.maximum(
        units.amax(dim=1) / number_format.qmax, units.amin(dim=1) / number_format.qmin
    )
    vanishing = weight.abs().amax(dim=1) < 1e-30
    assert torch.allclose(reaches[~vanishing], torch.ones(()), rtol=1e-5)


@pytest.mark.parametrize("name", ["we2m1b16", "we2m1b32", "we4m3b32", "we5m2b32", "we2m1b8"])
def test_minmax_clips_nothing_with_the_scales_that_are_stored(name: str) -> None:
    number_format = Precision.parse(name).weight
    assert number_format is not None
    weight = weights("normal")
    quantizer = WeightQuantizer("w", [number_format], 0)
    quantizer.set_scale(number_format, minmax_weight_scales(weight, [number_format], 0)[0])
    units = weight / quantizer.spread_scale(weight, number_format)
    largest = float_layout(number_format.scheme).largest
    assert float(units.abs().max()) <= largest * (1 + 1e-6)
    assert float(units.abs().max()) > largest / 2


def test_a_larger_exponent_clips_less() -> None:
    weight = weights("laplace")
    scales = [mse_weight_scales(weight, [NumberFormat(4)], 0, p=p)[0].mean() for p in (1, 2, 4)]
    assert scales[0] < scales[1] < scales[2]


def test_the_rules_are_those_functions() -> None:
    found = {name: rule.find for name, rule in WEIGHT_SCALES.items()}
    assert found == {"minmax": minmax_weight_scales, "mse": mse_weight_scales}


def test_huge_and_tiny_channels_are_searched_as_others() -> None:
    row = torch.randn(1, 300, generator=torch.Generator().manual_seed(8))
    weight = torch.cat([row, row * 2.0**80, row * 2.0**-80])
    (scale,) = mse_weight_scales(weight, [NumberFormat(3)], 0)
    assert torch.equal(scale / scale[0], torch.tensor([1.0, 2.0**80, 2.0**-80]))


@pytest.mark.parametrize("rule", [mse_weight_scales, minmax_weight_scales])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(
    "name", ["w4t", "w4b8", "w4b200", "w16b8", "we4m3", "we2m1b16", "we2m1b32"]
)
def test_scales_of_every_granularity_are_those_of_its_rows(
    rule: Callable[..., list[torch.Tensor]], axis: int, name: str
) -> None:
    number_format = Precision.parse(name).weight
    assert number_format is not None
    weight = torch.randn(6, 5, 3, 3, generator=torch.Generator().manual_seed(6))
    (scale,) = rule(weight, [number_format], axis)
    assert scale.shape == scale_shape(weight.shape, axis, number_format.granularity)
    rows = scale_rows(weight, axis, number_format.granularity)
    (expected,) = rule(rows, [number_format], 0)
    assert torch.allclose(scale.flatten(), expected.flatten())


def test_smaller_blocks_lose_less() -> None:
    weight = torch.randn(8, 512, generator=torch.Generator().manual_seed(7))
    lost = []
    for name in ("w4t", "w4", "w4b128", "w4b32", "w4b16"):
        number_format = Precision.parse(name).weight
        assert number_format is not None
        quantizer = WeightQuantizer("w", [number_format], axis=0)
        quantizer.set_scale(number_format, mse_weight_scales(weight, [number_format], 0)[0])
        error = quantizer.quantize(weight, number_format) - weight
        lost.append(float(error.square().sum()))
    assert lost == sorted(lost, reverse=True)
    assert lost[-1] < 0.6 * lost[0]
