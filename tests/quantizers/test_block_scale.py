from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxmpq.formats import NumberFormat, Precision, Scheme
from fxmpq.quantizers.block_scale import block_scales, unit_scale
from fxmpq.quantizers.codes import round_in_place
from fxmpq.quantizers.scales import storable_scale

NAMES = ["w2b16", "w4b32", "w8b32", "we2m1b16", "we2m1b32", "we4m3b32", "we5m2b32", "we2m1b64"]


def weight_format(name: str) -> NumberFormat:
    found = Precision.parse(name).weight
    assert found is not None
    return found


def rows_of(seed: int, count: int = 40, values: int = 32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, values, generator=generator)
    return rows * torch.exp2(torch.randint(-4, 4, (count, 1), generator=generator).float())


def errors(rows: torch.Tensor, scale: torch.Tensor, number_format: NumberFormat) -> torch.Tensor:
    spread = scale[:, None]
    rounded = round_in_place(rows / spread, number_format) * spread
    return (rounded.double() - rows.double()).square().sum(dim=1)


@pytest.mark.parametrize("name", ["w2b16", "w4b32", "w8b32", "we2m1b64"])
def test_scales_are_within_percents_of_brute_force(name: str) -> None:
    rows, number_format = rows_of(0), weight_format(name)
    unit = unit_scale(rows.abs().amax(dim=1), number_format)
    trials = [unit * ratio for ratio in torch.linspace(0.2, 2.2, 1000).tolist()]
    best = torch.stack([errors(rows, trial, number_format) for trial in trials]).amin(dim=0)
    found = errors(rows, block_scales(rows, number_format), number_format)
    assert float(found.sum() / best.sum()) < 1.1


@pytest.mark.parametrize("name", ["we2m1b32", "we4m3b32", "we5m2b32"])
def test_power_of_two_scales_are_the_best_there_are(name: str) -> None:
    rows, number_format = rows_of(1), weight_format(name)
    trials = [torch.full((len(rows),), 2.0**exponent) for exponent in range(-25, 8)]
    best = torch.stack([errors(rows, trial, number_format) for trial in trials]).amin(dim=0)
    found = errors(rows, block_scales(rows, number_format), number_format)
    assert torch.equal(found, best)


def test_power_of_two_scales_are_no_worse_than_the_specifications() -> None:
    rows, number_format = rows_of(2), weight_format("we2m1b32")
    prescribed = torch.exp2(rows.abs().amax(dim=1).log2().floor() - 2)
    found = errors(rows, block_scales(rows, number_format), number_format)
    expected = errors(rows, prescribed, number_format)
    assert bool((found <= expected).all())
    assert float(found.sum() / expected.sum()) < 0.95


def test_e4m3_scales_beat_powers_of_two_and_are_close_to_free_ones() -> None:
    rows = rows_of(3, values=16)
    nv, free = weight_format("we2m1b16"), NumberFormat(4, Scheme.E2M1)
    mx = NumberFormat(4, Scheme.E2M1, weight_format("we2m1b32").granularity)
    found = {
        entry: errors(rows, block_scales(rows, entry), entry).sum() for entry in (nv, free, mx)
    }
    assert float(found[nv] / found[free]) < 1.1
    assert float(found[nv] / found[mx]) < 0.95


@given(st.sampled_from(NAMES), st.integers(0, 10_000))
def test_scales_can_be_stored_as_they_are(name: str, seed: int) -> None:
    number_format = weight_format(name)
    scale = block_scales(rows_of(seed, count=7, values=16), number_format)
    assert torch.equal(storable_scale(scale, number_format), scale)


@pytest.mark.parametrize("name", NAMES)
def test_zeros_and_vanishing_rows_have_positive_scales_and_disturb_no_others(name: str) -> None:
    number_format = weight_format(name)
    rows = rows_of(4, count=6)
    more = torch.cat([rows, torch.zeros(2, 32), torch.full((1, 32), 1e-44)])
    found = block_scales(more, number_format)
    assert bool((found > 0).all())
    assert torch.equal(found[:6], block_scales(rows, number_format))
    assert torch.equal(block_scales(torch.zeros(3, 32), number_format), torch.ones(3))


def test_more_rows_than_are_searched_at_once() -> None:
    rows, number_format = rows_of(5, count=5000), weight_format("w4b32")
    assert torch.equal(
        block_scales(rows, number_format)[4990:], block_scales(rows[4990:], number_format)
    )


@pytest.mark.parametrize(("name", "expected"), [("w4b32", 0.75), ("we2m1b32", 1.0)])
def test_searches_begin_at_the_largest_number(name: str, expected: float) -> None:
    assert float(unit_scale(torch.tensor(6.0), weight_format(name))) == expected


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("power", [2.0**-90, 2.0**100])
def test_huge_and_tiny_rows_are_searched_as_others(name: str, power: float) -> None:
    """Their squared errors would be zero or infinite in `float32`."""
    rows, number_format = rows_of(6, count=20), weight_format(name)
    assert torch.equal(
        block_scales(rows * power, number_format), block_scales(rows, number_format) * power
    )
