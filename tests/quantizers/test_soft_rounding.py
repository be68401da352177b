"""Soft rounding: closed forms, limits, and gradients against finite differences."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fxmpq.formats import NumberFormat, Scheme
from fxmpq.quantizers.integer import fake_quantize_activation
from fxmpq.quantizers.soft_rounding import (
    affine_round,
    hard_codes,
    inverse_rectified_sigmoid,
    rectified_sigmoid,
    rounding_penalty,
    rounding_start,
    straight_through_round,
)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(st.floats(-20, 20))
def test_rectified_sigmoid_is_its_formula_and_symmetric(v: float) -> None:
    found = float(rectified_sigmoid(torch.tensor(v, dtype=torch.float64)))
    assert found == pytest.approx(min(max(1.2 / (1 + math.exp(-v)) - 0.1, 0), 1))
    mirrored = float(rectified_sigmoid(torch.tensor(-v, dtype=torch.float64)))
    assert found + mirrored == pytest.approx(1)


def test_rectified_sigmoid_ends_at_finite_values_and_has_no_gradient_there() -> None:
    v = torch.tensor([-2.5, 0.0, 2.5], requires_grad=True)
    found = rectified_sigmoid(v)
    found.sum().backward()
    assert found[0] == 0
    assert found[2] == 1
    assert v.grad is not None
    assert v.grad.tolist() == pytest.approx([0, 1.2 / 4, 0])


@given(st.floats(0, 1))
def test_inverse_rectified_sigmoid_inverts(h: float) -> None:
    v = inverse_rectified_sigmoid(torch.tensor(h, dtype=torch.float64))
    assert torch.isfinite(v)
    assert float(rectified_sigmoid(v)) == pytest.approx(h, abs=1e-12)


@pytest.mark.parametrize("beta", [1.0, 2.0, 20.0])
def test_penalty_is_zero_at_the_ends_one_in_the_middle_and_grows_between(beta: float) -> None:
    assert float(rounding_penalty(torch.tensor([0.0, 1.0]), beta)) == 0
    assert float(rounding_penalty(torch.tensor([0.5, 0.5]), beta)) == 2
    values = [float(rounding_penalty(torch.tensor([h]), beta)) for h in (0.0, 0.1, 0.2, 0.4, 0.5)]
    assert values == sorted(values)
    assert float(rounding_penalty(torch.tensor([0.1]), beta)) == pytest.approx(1 - 0.8**beta)


def test_penalty_of_a_large_beta_pulls_at_the_ends_only() -> None:
    h = torch.tensor([0.02, 0.4], requires_grad=True)
    rounding_penalty(h, 20.0).backward()
    assert h.grad is not None
    assert h.grad[0] > 1
    assert 0 < h.grad[1] < 1e-6


@given(st.integers(0, 10_000), st.sampled_from([2, 3, 4, 8]))
def test_nearest_codes_start_at_the_weight_itself(seed: int, bits: int) -> None:
    number_format = NumberFormat(bits)
    low, high = number_format.qmin, number_format.qmax
    weight = draw(40, seed=seed).clamp(-1, 1) * 0.3 * high
    scale = torch.tensor(0.3)
    codes = torch.round(weight / scale).clamp(low, high)
    lower, v = rounding_start(weight, scale, codes, number_format)
    assert torch.equal(hard_codes(lower, v), codes)
    soft = lower + rectified_sigmoid(v)
    assert torch.allclose(soft, weight / scale, atol=1e-5)


@given(st.integers(0, 10_000), st.sampled_from([2, 3, 4, 8]))
def test_any_codes_are_where_it_starts_and_both_choices_are_legal(seed: int, bits: int) -> None:
    number_format = NumberFormat(bits)
    low, high = number_format.qmin, number_format.qmax
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(low, high + 1, (50,), generator=generator)
    lower, v = rounding_start(draw(50, seed=seed) * high, torch.tensor(1.0), codes, number_format)
    assert torch.equal(hard_codes(lower, v), codes.float())
    assert lower.min() >= low
    assert lower.max() + 1 <= high


def test_a_second_nearest_code_keeps_the_weight_between_its_neighbours() -> None:
    weight, codes = torch.tensor([0.3, 0.3, -0.3]), torch.tensor([1, 0, -1])
    lower, v = rounding_start(weight, torch.tensor(1.0), codes, NumberFormat(4))
    assert lower.tolist() == [0, 0, -1]
    assert rectified_sigmoid(v).tolist() == pytest.approx([0.55, 0.3, 0.45])


def test_a_clipped_weight_starts_at_the_last_code() -> None:
    weight, codes = torch.tensor([9.0, -9.0]), torch.tensor([1, -2])
    lower, v = rounding_start(weight, torch.tensor(1.0), codes, NumberFormat(2))
    assert (lower + rectified_sigmoid(v)).tolist() == pytest.approx([1, -2], abs=1e-6)


def test_straight_through_round_rounds_half_to_even_with_gradient_one() -> None:
    x = torch.tensor([0.5, 1.5, -2.3], requires_grad=True)
    found = straight_through_round(x)
    found.backward(torch.tensor([1.0, 2.0, 3.0]))
    assert found.tolist() == [0, 2, -2]
    assert x.grad is not None
    assert x.grad.tolist() == [1, 2, 3]


@given(st.integers(0, 10_000), st.sampled_from([2, 4, 8]), st.integers(0, 3))
def test_affine_round_is_what_the_quantizer_does(seed: int, bits: int, zero_point: int) -> None:
    number_format = NumberFormat(bits, Scheme.AFFINE)
    x = draw(64, seed=seed) * 3
    found = affine_round(
        x, torch.tensor(0.37), torch.tensor(zero_point + 0.2), 0, number_format.qmax
    )
    assert torch.allclose(found, fake_quantize_activation(x, 0.37, zero_point, number_format))


def reference_round(x: Tensor, scale: Tensor, centre: Tensor, low: int, high: int) -> Tensor:
    """The same, differentiated by autograd through straight-through roundings."""
    zero = straight_through_round(centre)
    return ((straight_through_round(x / scale) + zero).clamp(low, high) - zero) * scale


@given(st.integers(0, 10_000), st.floats(0.1, 1.5), st.floats(0, 15))
def test_gradients_of_affine_round_are_those_of_autograd(
    seed: int, scale: float, centre: float
) -> None:
    x = draw(3, 30, seed=seed).double() * 4
    weights = draw(3, 30, seed=seed + 1).double()
    found = []
    for function in (affine_round, reference_round):
        inputs = [x, torch.tensor(scale), torch.tensor(centre)]
        inputs = [value.double().clone().requires_grad_() for value in inputs]
        output = function(*inputs, 0, 15)
        found.append([output, *torch.autograd.grad((output * weights).sum(), inputs)])
    for ours, reference in zip(*found, strict=True):
        assert torch.allclose(ours, reference, atol=1e-9)


def test_a_range_that_clips_grows_and_moves_towards_what_it_cuts_off() -> None:
    scale = torch.tensor(0.5, requires_grad=True)
    centre = torch.tensor(1.0, requires_grad=True)
    x = torch.tensor([-5.0, -4.0])
    (affine_round(x, scale, centre, 0, 3) - x).square().sum().backward()
    assert scale.grad is not None
    assert centre.grad is not None
    assert scale.grad < 0
    assert centre.grad < 0
