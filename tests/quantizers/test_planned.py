from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fxmpq.formats import NumberFormat, Precision, Scheme
from fxmpq.granularity import PerBlock, PerTensor
from fxmpq.quantizers.learned import learned_round
from fxmpq.quantizers.modules import ActivationQuantizer, WeightQuantizer
from fxmpq.quantizers.planned import (
    PassingQuantizer,
    PlannedQuantizer,
    learned_gradients,
    planned_quantizer,
    straight_through,
)
from fxmpq.quantizers.ranges import ActivationRange
from fxmpq.quantizers.weight_scale import mse_weight_scales

CPU = torch.device("cpu")
WEIGHT_FORMATS = [
    NumberFormat(2),
    NumberFormat(4),
    NumberFormat(8),
    NumberFormat(3, Scheme.SYMMETRIC, PerBlock(5)),
    NumberFormat(4, Scheme.SYMMETRIC, PerTensor()),
]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def weight_quantizer(weight: Tensor, number_format: NumberFormat, axis: int = 0) -> WeightQuantizer:
    quantizer = WeightQuantizer("weight", [number_format], axis)
    quantizer.set_scale(number_format, mse_weight_scales(weight, [number_format], axis)[0])
    quantizer.activate(number_format)
    return quantizer


def activation_quantizer(scale: float, zero_point: int, bits: int = 8) -> ActivationQuantizer:
    number_format = NumberFormat(bits, Scheme.AFFINE)
    quantizer = ActivationQuantizer("x", [number_format])
    quantizer.ranges[number_format.name] = ActivationRange(scale, zero_point)
    quantizer.activate(number_format)
    return quantizer


@given(
    seed=st.integers(0, 10**6),
    step=st.floats(0.01, 2.0),
    bits=st.sampled_from([2, 3, 4, 8]),
    zero_point=st.integers(0, 3),
)
def test_gradients_are_those_of_learned_rounding(
    seed: int, step: float, bits: int, zero_point: int
) -> None:
    """The reference is written in torch's own operators, which differentiate themselves."""
    low, high = -zero_point, 2**bits - 1 - zero_point
    upstream = draw(40, seed=seed + 1)
    found = {}
    for name in ("reference", "own"):
        x = draw(40, seed=seed).requires_grad_()
        learned = torch.tensor(step).requires_grad_()
        if name == "own":
            result = learned_gradients(
                x, learned, lambda a, s: (a / s).round().clamp(low, high) * s, low, high, 40
            )
        else:
            result = learned_round(x, learned, low, high)
        result.backward(upstream)
        found[name] = (result.detach(), x.grad, learned.grad)
    for own, expected in zip(found["own"], found["reference"], strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-5)


def test_a_step_gets_the_gradient_of_its_own_channel_alone() -> None:
    weight, upstream = draw(3, 8), draw(3, 8, seed=1)
    quantizer = planned_quantizer(weight_quantizer(weight, NumberFormat(3)), CPU)
    assert isinstance(quantizer, PlannedQuantizer)
    quantizer(weight).backward(upstream)
    for channel in range(3):
        step = quantizer.initial[channel].clone().requires_grad_()
        learned_round(weight[channel], step, -4, 3).backward(upstream[channel])
        assert step.grad is not None
        assert quantizer.ratio.grad is not None
        expected = step.grad / quantizer.initial[channel]
        assert float(quantizer.ratio.grad[channel]) == pytest.approx(float(expected), rel=1e-3)


def test_the_mean_over_samples_has_the_mean_of_their_gradients() -> None:
    """So that several processes, each with a part of a batch, train as one with all of it."""
    x, upstream = draw(6, 5, 4), draw(6, 5, 4, seed=1)
    gradients = []
    for parts in (1, 3):
        quantizer = planned_quantizer(activation_quantizer(0.02, 100), CPU)
        for part, weights in zip(x.chunk(parts), upstream.chunk(parts), strict=True):
            ((quantizer(part) * weights).sum() / len(x)).backward()
        gradients.append(next(iter(quantizer.parameters())).grad)
    torch.testing.assert_close(*gradients)


def test_steps_of_blocks_add_up_over_their_block() -> None:
    number_format = NumberFormat(3, Scheme.SYMMETRIC, PerBlock(5))
    weight, upstream = draw(2, 8), draw(2, 8, seed=1)
    quantizer = planned_quantizer(weight_quantizer(weight, number_format), CPU)
    assert isinstance(quantizer, PlannedQuantizer)
    quantizer(weight).backward(upstream)
    assert quantizer.ratio.shape == (2, 2)
    initial = quantizer.initial[1, 1]
    step = initial.clone().requires_grad_()
    learned_round(weight[1, 5:], step, -4, 3).backward(upstream[1, 5:])
    assert step.grad is not None
    assert quantizer.ratio.grad is not None
    # Three values have this step, four have one on average.
    expected = float(step.grad / initial) * (3 / 4) ** 0.5
    assert float(quantizer.ratio.grad[1, 1]) == pytest.approx(expected, rel=1e-3)


def test_gradient_descent_moves_the_step_as_without_a_ratio() -> None:
    weight, upstream, rate = draw(1, 30), draw(1, 30, seed=1), 0.01
    quantizer = planned_quantizer(weight_quantizer(weight, NumberFormat(3)), CPU)
    assert isinstance(quantizer, PlannedQuantizer)
    step = quantizer.initial.clone().requires_grad_()
    learned_round(weight, step, -4, 3).backward(upstream)
    quantizer(weight).backward(upstream)
    torch.optim.SGD(quantizer.parameters(), rate).step()
    assert step.grad is not None
    # d step = initial * d ratio = -rate * gradient
    expected = quantizer.initial - rate * step.grad
    torch.testing.assert_close(quantizer.step, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("number_format", WEIGHT_FORMATS, ids=lambda entry: entry.name)
@pytest.mark.parametrize("axis", [0, 1])
def test_it_begins_with_what_the_weight_quantizer_computes(
    number_format: NumberFormat, axis: int
) -> None:
    weight = draw(4, 6, 3, 3)
    source = weight_quantizer(weight, number_format, axis)
    assert torch.equal(planned_quantizer(source, CPU)(weight), source(weight))


@given(scale=st.floats(1e-3, 10), zero_point=st.integers(0, 255), seed=st.integers(0, 10**6))
def test_it_begins_with_what_the_activation_quantizer_computes(
    scale: float, zero_point: int, seed: int
) -> None:
    scale = float(torch.tensor(scale))
    x = draw(50, seed=seed) * scale * 100
    source = activation_quantizer(scale, zero_point)
    assert torch.equal(planned_quantizer(source, CPU)(x), source(x))


@given(ratio=st.floats(0.1, 10), seed=st.integers(0, 10**6))
def test_with_other_steps_it_computes_what_the_quantizers_do_with_these(
    ratio: float, seed: int
) -> None:
    x = draw(3, 20, seed=seed)
    weights, activations = weight_quantizer(x, NumberFormat(4)), activation_quantizer(0.02, 100)
    for source in (weights, activations):
        quantizer = planned_quantizer(source, CPU)
        assert isinstance(quantizer, PlannedQuantizer)
        with torch.no_grad():
            quantizer.ratio.fill_(ratio)
        if isinstance(source, WeightQuantizer):
            source.set_scale(NumberFormat(4), quantizer.step)
        else:
            source.ranges["uint8"] = ActivationRange(float(quantizer.step), quantizer.zero_point)
        assert torch.equal(quantizer(x), source(x))


def test_a_16_bit_weight_keeps_its_codes() -> None:
    weight = draw(2, 50)
    source = weight_quantizer(weight, NumberFormat(16))
    assert torch.equal(planned_quantizer(source, CPU)(weight), source(weight))


def test_steps_stay_positive_and_bounded() -> None:
    quantizer = PlannedQuantizer("weight", NumberFormat(4), torch.tensor([0.5, 0.5, 0.5]))
    with torch.no_grad():
        quantizer.ratio.copy_(torch.tensor([-1.0, 1e9, 1.5]))
    quantizer.clamp_steps()
    assert quantizer.ratio.tolist() == pytest.approx([1e-3, 1e3, 1.5])


@pytest.mark.parametrize("precision", ["we4m3ae4m3", "we2m1b4ae5m2"])
def test_float_formats_pass_gradients_and_keep_their_scales(precision: str) -> None:
    found = Precision.parse(precision)
    assert found.weight is not None
    assert found.activation is not None
    x = draw(2, 12)
    activations = ActivationQuantizer("x", [found.activation])
    activations.ranges[found.activation.name] = ActivationRange(0.01, 0)
    activations.activate(found.activation)
    for source in (weight_quantizer(x, found.weight), activations):
        quantizer = planned_quantizer(source, CPU)
        assert isinstance(quantizer, PassingQuantizer)
        assert list(quantizer.parameters()) == []
        leaf = x.clone().requires_grad_()
        result = quantizer(leaf)
        assert torch.equal(result, source(x))
        assert not torch.equal(result, x)
        result.sum().backward()
        assert leaf.grad is not None
        assert torch.equal(leaf.grad, torch.ones_like(x))


@pytest.mark.parametrize("precision", ["a8d", "a4dt"])
def test_a_dynamic_range_has_no_step_to_learn(precision: str) -> None:
    found = Precision.parse(precision).activation
    assert found is not None
    source = ActivationQuantizer("x", [found])
    source.activate(found)
    quantizer = planned_quantizer(source, CPU)
    assert isinstance(quantizer, PassingQuantizer)
    leaf = draw(3, 12).requires_grad_()
    result = quantizer(leaf)
    assert torch.equal(result, source(leaf.detach()))
    assert not torch.equal(result, leaf)
    result.sum().backward()
    assert leaf.grad is not None
    assert torch.equal(leaf.grad, torch.ones_like(leaf))


def test_straight_through_is_the_identity_backwards() -> None:
    x = draw(7).requires_grad_()
    result = straight_through(x, torch.sign)
    assert torch.equal(result, x.sign())
    result.backward(draw(7, seed=3))
    assert x.grad is not None
    assert torch.equal(x.grad, draw(7, seed=3))
