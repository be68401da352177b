from __future__ import annotations

import pytest
import torch

from fxmpq.formats import NumberFormat
from fxmpq.quantizers.integer import dequantize_weight, weight_codes
from fxmpq.quantizers.weight_scale import mse_weight_scales

WIDTHS = [2, 3, 4, 5, 6, 7, 8, 16]


def errors(weight: torch.Tensor, scale: torch.Tensor, number_format: NumberFormat) -> torch.Tensor:
    codes = weight_codes(weight, scale, number_format, 0)
    return (dequantize_weight(codes, scale, 0) - weight).double().square().sum(dim=1)


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
    codes = weight_codes(weight, scale, NumberFormat(16), 0)
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
