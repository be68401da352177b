from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fxmpq.errors import FxmpqError
from fxmpq.sensitivity.probes import check_probes, draw_probes, most_probes

WIDTHS = st.integers(1, 20)
SEEDS = st.integers(0, 2**64 - 1)


def draw(samples: int, width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, width, generator=generator, dtype=torch.float64)


@given(width=WIDTHS, seed=SEEDS)
def test_all_probes_together_are_exact(width: int, seed: int) -> None:
    outputs = draw(3, width)
    vectors = draw_probes(outputs, 1000, seed=seed)
    assert vectors.shape == (most_probes(width), 3, width)
    moments = torch.einsum("pnd,pne->nde", vectors, vectors) / len(vectors)
    torch.testing.assert_close(moments, torch.eye(width, dtype=torch.float64).expand(3, -1, -1))


@given(power=st.integers(0, 5), probes=st.integers(1, 32), seed=SEEDS)
def test_probes_of_a_sample_are_orthogonal(power: int, probes: int, seed: int) -> None:
    width = 2**power
    vectors = draw_probes(draw(2, width), probes, seed=seed).transpose(0, 1)
    kept = min(probes, width)
    products = vectors @ vectors.transpose(1, 2)
    torch.testing.assert_close(
        products, width * torch.eye(kept, dtype=torch.float64).expand(2, -1, -1)
    )


@pytest.mark.parametrize("output", [[0.0, 0, 0], [-2.0, 0, 0], [3.0, 0, 0], [0.1, -0.7, 2]])
def test_one_probe_is_unbiased(output: list[float]) -> None:
    outputs = torch.tensor(output, dtype=torch.float64).expand(6_000, -1)
    vectors = draw_probes(outputs, 1, seed=1)[0]
    moments = vectors.T @ vectors / len(vectors)
    torch.testing.assert_close(moments, torch.eye(3, dtype=torch.float64), atol=0.07, rtol=0)
    assert vectors.mean(0).abs().max() < 0.07


@given(width=WIDTHS, scale=st.floats(-5, 5), seed=SEEDS)
def test_an_error_along_the_output_is_estimated_exactly(
    width: int, scale: float, seed: int
) -> None:
    outputs = draw(4, width)
    vectors = draw_probes(outputs, 1, seed=seed)[0]
    estimates = (vectors * scale * outputs).sum(1).square()
    torch.testing.assert_close(estimates, scale**2 * outputs.square().sum(1))


def test_variance_is_that_of_signs_in_the_reflected_basis() -> None:
    error = torch.tensor([1.0, 2.0, -1.0, 0.5], dtype=torch.float64)
    # With an output of zero the basis is that of the coordinates.
    vectors = draw_probes(torch.zeros(20_000, 4, dtype=torch.float64), 1, seed=2)[0]
    found = (vectors @ error).square().var()
    expected = 2 * (error.square().sum() ** 2 - error.pow(4).sum())
    assert found == pytest.approx(float(expected), rel=0.05)


@given(split=st.integers(0, 7), probes=st.integers(1, 8), seed=SEEDS)
def test_directions_depend_on_the_samples_number_alone(split: int, probes: int, seed: int) -> None:
    outputs = draw(7, 5).float()
    whole = draw_probes(outputs, probes, seed=seed, first_sample=3)
    first = draw_probes(outputs[:split], probes, seed=seed, first_sample=3)
    second = draw_probes(outputs[split:], probes, seed=seed, first_sample=3 + split)
    assert torch.equal(torch.cat([first, second], dim=1), whole)


@given(probes=st.integers(1, 15), seed=SEEDS)
def test_the_first_probes_do_not_depend_on_how_many_follow(probes: int, seed: int) -> None:
    outputs = draw(3, 9)
    few, many = (draw_probes(outputs, count, seed=seed) for count in (probes, 16))
    assert torch.equal(few, many[:probes])


def test_seeds_and_samples_have_streams_of_their_own() -> None:
    zeros = torch.zeros(50, 200)
    one, other = (draw_probes(zeros, 1, seed=seed)[0] for seed in (0, 1))
    assert not torch.equal(one, other)
    signs = torch.cat([one, other])
    correlations = (signs @ signs.T / 200).fill_diagonal_(0)
    assert correlations.abs().max() < 0.4


def test_dtype_and_device_are_the_outputs() -> None:
    assert draw_probes(torch.zeros(2, 3, dtype=torch.float16), 1, seed=0).dtype == torch.float16


def test_the_global_generator_is_left_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    draw_probes(torch.zeros(3, 3), 2, seed=0)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((0, 0, 0), "probes=0; at least one"),
        ((1, -1, 0), "seed=-1; it must lie between"),
        ((1, 2**64, 0), "seed=18446744073709551616"),
        ((1, 0, -3), "first_sample=-3"),
    ],
)
def test_numbers_without_a_stream(numbers: tuple[int, int, int], message: str) -> None:
    check_probes(1, 2**64 - 1, 0)
    with pytest.raises(FxmpqError, match=message):
        check_probes(*numbers)
