from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import entropy
from torch import Tensor

from fxmpq.formats import NumberFormat, Precision, Scheme
from fxmpq.quantizers.floating import fake_quantize_float
from fxmpq.quantizers.integer import fake_quantize_activation
from fxmpq.quantizers.range_losses import kl_losses, lp_losses

UINT2, UINT3 = (NumberFormat(bits, Scheme.AFFINE) for bits in (2, 3))
E4M3 = Precision.parse("we4m3ae4m3").activation

HISTOGRAMS = st.dictionaries(st.integers(-40, 40), st.integers(1, 9), min_size=1, max_size=25)
SCALES = st.sampled_from([0.25, 0.5, 1.0, 1.5, 3.0, 7.0])


def arrays(histogram: dict[int, int]) -> tuple[Tensor, Tensor]:
    """Bins at odd quarters, so that no value lies on a rounding boundary of the scales."""
    places = sorted(histogram)
    values = torch.tensor(places, dtype=torch.float64) * 0.31
    return values, torch.tensor([histogram[place] for place in places], dtype=torch.float64)


def divergence(
    values: np.ndarray, counts: np.ndarray, scale: float, zero_point: int, top: int
) -> float:
    """The definition with a loop over codes: clip, merge into cells, spread, compare."""
    codes = np.round(values / scale) + zero_point
    inside = (codes >= 0) & (codes <= top)
    if not inside.any():
        return float("inf")
    clipped = np.where(inside, counts, 0.0)
    first, last = np.flatnonzero(inside)[[0, -1]]
    clipped[first] += counts[codes < 0].sum()
    clipped[last] += counts[codes > top].sum()
    spread = np.zeros_like(counts)
    for code in range(top + 1):
        cell = inside & (codes == code)
        if cell.any():
            spread[cell] = counts[cell].mean()
    return float(entropy(clipped[inside], spread[inside]))


@given(HISTOGRAMS, SCALES, st.integers(0, 7))
def test_the_divergence_is_its_definition(
    histogram: dict[int, int], scale: float, zero_point: int
) -> None:
    values, counts = arrays(histogram)
    one = torch.tensor([scale], dtype=torch.float64)
    zero = torch.tensor([zero_point], dtype=torch.float64)
    found = float(kl_losses(values, counts, one, zero, UINT3))
    expected = divergence(values.numpy(), counts.numpy(), scale, zero_point, 7)
    assert found == pytest.approx(expected, abs=1e-12)
    assert found > -1e-12


@given(HISTOGRAMS, SCALES, st.integers(0, 3), st.sampled_from([0.5, 1.0, 2.0, 2.4, 4.0]))
def test_the_lp_error_is_that_of_the_simulation(
    histogram: dict[int, int], scale: float, zero_point: int, p: float
) -> None:
    values, counts = arrays(histogram)
    one = torch.tensor([scale], dtype=torch.float64)
    zero = torch.tensor([zero_point], dtype=torch.float64)
    found = float(lp_losses(values, counts, one, zero, UINT2, p))
    quantized = fake_quantize_activation(values.float(), scale, zero_point, UINT2)
    error = (quantized.double() - values).abs() ** p
    assert found == pytest.approx(float(error @ counts), rel=1e-4, abs=1e-4)


def test_ranges_are_judged_together_as_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(300, generator=generator, dtype=torch.float64).sort().values
    counts = torch.rand(300, generator=generator, dtype=torch.float64)
    scales = torch.tensor([0.1, 0.5, 2.0], dtype=torch.float64)
    zeros = torch.tensor([3.0, 0.0, 7.0], dtype=torch.float64)
    for losses in (kl_losses, lambda *given: lp_losses(*given, p=2.0)):
        together = losses(values, counts, scales, zeros, UINT3)
        alone = [
            losses(values, counts, scales[i : i + 1], zeros[i : i + 1], UINT3) for i in range(3)
        ]
        assert torch.allclose(together, torch.cat(alone), rtol=1e-12)


def test_cells_of_one_bin_lose_nothing() -> None:
    values = torch.arange(8, dtype=torch.float64)
    counts = torch.tensor([5.0, 1, 4, 2, 8, 1, 1, 9], dtype=torch.float64)
    one, zero = torch.ones(1).double(), torch.zeros(1).double()
    assert float(kl_losses(values, counts, one, zero, UINT3)) == pytest.approx(0, abs=1e-15)
    assert float(kl_losses(values, counts, 2 * one, zero, UINT3)) > 0.1


def test_a_range_without_values_is_infinitely_bad() -> None:
    values, counts = torch.tensor([50.0, 60.0]).double(), torch.ones(2).double()
    one, zero = torch.ones(1).double(), torch.zeros(1).double()
    assert float(kl_losses(values, counts, one, zero, UINT3)) == float("inf")


def test_floats_are_rounded_as_in_the_simulation() -> None:
    assert E4M3 is not None
    generator = torch.Generator().manual_seed(1)
    values = (torch.randn(500, generator=generator) * 3).sort().values
    counts = torch.ones(500, dtype=torch.float64)
    scale = torch.tensor([0.004], dtype=torch.float64)
    found = lp_losses(values.double(), counts, scale, 0 * scale, E4M3, 2.0)
    error = fake_quantize_float(values, 0.004, E4M3) - values
    assert float(found) == pytest.approx(float(error.double().square().sum()), rel=1e-3)
    whole = kl_losses(values.double(), counts, 8 * scale, 0 * scale, E4M3)
    clipping = kl_losses(values.double(), counts, scale / 4, 0 * scale, E4M3)
    assert float(whole) < 1e-12 < float(clipping)
