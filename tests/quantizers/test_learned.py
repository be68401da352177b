from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fxmpq.errors import PrecisionError
from fxmpq.formats import NumberFormat, Scheme
from fxmpq.quantizers.codes import dequantize, nearest_codes
from fxmpq.quantizers.integer import fake_quantize_activation
from fxmpq.quantizers.learned import (
    LearnedQuantizer,
    activation_step,
    learned_round,
    weight_step,
)

INT2, INT4, INT8 = NumberFormat(2), NumberFormat(4), NumberFormat(8)
LEVELS = {entry: (entry.qmin, entry.qmax) for entry in (INT2, INT4, INT8)}

levels = st.sampled_from([(-2, 1), (-8, 7), (-128, 127), (0, 3), (0, 255), (-5, 10), (-15, 0)])
seeds = st.integers(0, 2**31)


def gradients(x: Tensor, step: float, low: int, high: int) -> tuple[Tensor, Tensor, Tensor]:
    """What `learned_round` gives, and its gradients for a loss that weighs each value."""
    x = x.clone().requires_grad_()
    learned = torch.tensor(step, dtype=x.dtype, requires_grad=True)
    rounded = learned_round(x, learned, low, high)
    weights = torch.linspace(-1, 2, x.numel(), dtype=x.dtype).reshape(x.shape)
    (rounded * weights).sum().backward()
    assert x.grad is not None
    assert learned.grad is not None
    return rounded.detach(), x.grad, learned.grad


@given(seeds, st.floats(0.01, 3.0), levels)
def test_values_and_gradients_are_those_of_the_paper(
    seed: int, step: float, limits: tuple[int, int]
) -> None:
    low, high = limits
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4, 5, generator=generator, dtype=torch.float64) * step * max(high, -low)
    rounded, to_x, to_step = gradients(x, step, low, high)
    u = x / step
    assert torch.equal(rounded, step * u.clamp(low, high).round())
    weights = torch.linspace(-1, 2, 20, dtype=torch.float64).reshape(4, 5)
    inside = (u > low) & (u < high)
    assert torch.allclose(to_x, torch.where(inside, weights, 0.0), rtol=1e-12, atol=0)
    ends = torch.where(u <= low, float(low), float(high))
    per_value = torch.where(inside, u.round() - u, ends)
    largest = max(high, -low - 1)
    expected = (per_value * weights).sum() / math.sqrt(largest * x.numel())
    assert torch.allclose(to_step, expected, rtol=1e-9, atol=1e-12)


@given(seeds, st.floats(0.05, 2.0), levels)
def test_the_gradient_of_the_step_is_a_finite_difference_with_rounding_held_fixed(
    seed: int, step: float, limits: tuple[int, int]
) -> None:
    low, high = limits
    x = torch.randn(7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2
    residue = (x / step).clamp(low, high).round() - (x / step).clamp(low, high)

    def surrogate(s: float) -> float:
        weights = torch.linspace(-1, 2, 7, dtype=torch.float64)
        return float((s * ((x / s).clamp(low, high) + residue) * weights).sum())

    # A value that crosses an end between the two points has two slopes.
    width = 1e-6
    crosses = ((x / (step + width)).clamp(low, high) == x / (step + width)) != (
        (x / (step - width)).clamp(low, high) == x / (step - width)
    )
    if crosses.any():
        return
    slope = (surrogate(step + width) - surrogate(step - width)) / (2 * width)
    _, _, to_step = gradients(x, step, low, high)
    scale = 1 / math.sqrt(max(high, -low - 1) * 7)
    assert float(to_step) == pytest.approx(slope * scale, rel=1e-4, abs=1e-6)


def test_beyond_the_ends_the_step_moves_the_value_as_it_is() -> None:
    x = torch.tensor([9.0, -7.0], dtype=torch.float64)
    for value, slope in zip(x, (1, -2), strict=True):
        steps = [torch.tensor(step, dtype=torch.float64) for step in (0.5, 0.5 + 2**-10)]
        both = [float(learned_round(value, step, -2, 1)) for step in steps]
        _, _, to_step = gradients(value[None], 0.5, -2, 1)
        assert (both[1] - both[0]) * 2**10 == pytest.approx(slope)
        assert float(to_step) == pytest.approx(-slope)  # the loss weighs the first value by -1


def test_the_scale_of_the_gradient_takes_the_largest_code_of_either_kind_of_format() -> None:
    x = torch.full((4,), 100.0, dtype=torch.float64)
    weights = float(torch.linspace(-1, 2, 4).sum())
    for number_format in (INT4, NumberFormat(4, Scheme.AFFINE)):
        high = number_format.qmax
        _, _, to_step = gradients(x, 1.0, number_format.qmin, high)
        assert float(to_step) == pytest.approx(weights * high / math.sqrt(high * 4))


@given(seeds, st.sampled_from([2, 3, 4, 8]))
def test_it_agrees_with_the_quantizers_that_do_not_learn(seed: int, bits: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 40, generator=generator)
    step = torch.tensor(0.125)
    signed, unsigned = NumberFormat(bits), NumberFormat(bits, Scheme.AFFINE)
    fixed = dequantize(nearest_codes(x, step, signed), step, signed)
    assert torch.equal(learned_round(x, step, signed.qmin, signed.qmax), fixed)
    for zero_point in (0, 1, unsigned.qmax):
        fixed = fake_quantize_activation(x, float(step), zero_point, unsigned)
        found = learned_round(x, step, -zero_point, unsigned.qmax - zero_point)
        assert torch.equal(found, fixed)


def test_an_empty_tensor_has_no_gradient() -> None:
    step = torch.tensor(0.5, requires_grad=True)
    learned_round(torch.empty(0), step, 0, 3).sum().backward()
    assert step.grad is not None
    assert float(step.grad) == 0


@given(seeds, st.floats(-3, 3), st.floats(0.01, 3))
def test_steps_begin_at_three_deviations(seed: int, shift: float, spread: float) -> None:
    weight = torch.randn(50, generator=torch.Generator().manual_seed(seed)) * spread + shift
    values = weight.double()
    mean, deviation = values.mean(), values.var(correction=0).sqrt()
    ends = [float(abs(mean + sign * 3 * deviation)) for sign in (-1, 1)]
    assert weight_step(weight, INT4) == pytest.approx(max(ends) / 8)
    assert weight_step(weight, INT2) == pytest.approx(64 * weight_step(weight, INT8))


def test_an_activation_begins_at_twice_its_magnitude_over_the_root_of_its_largest_code() -> None:
    assert activation_step(0.3, 0, 255) == pytest.approx(0.6 / math.sqrt(255))
    assert activation_step(0.3, -128, 127) == pytest.approx(0.6 / math.sqrt(127))
    assert activation_step(0.3, -3, 0) == pytest.approx(0.6 / math.sqrt(2))


def quantizer(peak: float = 0.8, step: float = 0.1) -> LearnedQuantizer:
    return LearnedQuantizer("weight", dict.fromkeys(LEVELS, step), LEVELS, peak)


def test_off_it_returns_what_it_gets() -> None:
    x = torch.randn(3)
    module = quantizer()
    assert module(x) is x
    module.activate(INT4)
    assert not torch.equal(module(x), x)
    assert "int4" in repr(module)
    module.activate(None)
    assert module(x) is x


def test_only_the_active_step_gets_a_gradient() -> None:
    module = quantizer()
    module.activate(INT2)
    module(torch.ones(3)).sum().backward()
    found = {name: p.grad is not None for name, p in module.named_parameters()}
    assert found == {"steps.int2": True, "steps.int4": False, "steps.int8": False}


def test_a_format_without_a_step_is_an_error_with_those_there_are() -> None:
    with pytest.raises(PrecisionError, match="weight has no step for int3; it has int2, int4"):
        quantizer().activate(NumberFormat(3))
    with pytest.raises(PrecisionError, match="it has none"):
        LearnedQuantizer("x", {}, {}, 0.0).activate(INT2)


@pytest.mark.parametrize(
    ("peak", "low", "high"),
    [(1.0, 1e-5, 1.0), (30.0, 1e-5, 30.0), (0.01, 1e-7, 1.0), (0.0, 1e-5, 1.0)],
)
def test_steps_stay_within_bounds_that_grow_with_the_tensor(
    peak: float, low: float, high: float
) -> None:
    module = quantizer(peak, step=1e6)
    assert float(module.step(INT4).detach()) == pytest.approx(high)
    module.set_step(INT4, -1.0)
    assert float(module.step(INT4).detach()) == pytest.approx(low)
    with torch.no_grad():
        module.step(INT2).fill_(1e6)
        module.step(INT8).fill_(0.5)
    module.clamp_steps()
    found = [float(module.step(entry).detach()) for entry in (INT2, INT4, INT8)]
    assert found == pytest.approx([high, low, 0.5])


def test_steps_that_learn_to_round_well_grow_as_bits_shrink() -> None:
    x = torch.randn(2000, generator=torch.Generator().manual_seed(0)).clamp(-3, 3)
    module = quantizer(peak=3.0, step=0.3)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.02)
    errors = []
    for _ in range(200):
        optimizer.zero_grad()
        total = torch.zeros(())
        for number_format in LEVELS:
            module.activate(number_format)
            total = total + (module(x) - x).square().mean()
        total.backward()
        optimizer.step()
        module.clamp_steps()
        errors.append(float(total.detach()))
    steps = [float(module.step(entry).detach()) for entry in (INT2, INT4, INT8)]
    assert errors[-1] < 0.5 * errors[0]
    assert steps[0] > 2 * steps[1] > 4 * steps[2]
    trials = torch.linspace(0.2, 2.0, 181)
    losses = [(learned_round(x, step, -2, 1) - x).square().mean() for step in trials]
    assert steps[0] == pytest.approx(float(trials[int(torch.stack(losses).argmin())]), rel=0.15)
