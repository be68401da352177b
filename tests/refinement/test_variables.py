from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fxmpq.formats import NumberFormat, Precision, Scheme
from fxmpq.quantizers.modules import ActivationQuantizer, WeightQuantizer
from fxmpq.quantizers.ranges import ActivationRange
from fxmpq.quantizers.scales import scale_shape
from fxmpq.refinement.variables import FreeWeight, LearnedRange, SoftWeight

from .conftest import draw

FORMATS = [Precision.parse(text).weight for text in ("w2", "w4", "w4t", "w3b4", "w8")]


def quantizer_of(weight: Tensor, number_format: NumberFormat, axis: int = 0) -> WeightQuantizer:
    quantizer = WeightQuantizer("weight", [number_format], axis)
    shape = scale_shape(tuple(weight.shape), axis, number_format.granularity)
    scale = draw(*shape, seed=9).abs() * 0.1 + 1.5 / number_format.qmax
    quantizer.set_scale(number_format, scale)
    quantizer.activate(number_format)
    return quantizer


def some_codes(weight: Tensor, quantizer: WeightQuantizer, seed: int) -> Tensor:
    """Codes up to one step from the nearest."""
    assert quantizer.active is not None
    near = quantizer.codes(weight, quantizer.active).long()
    moves = torch.randint(-1, 2, near.shape, generator=torch.Generator().manual_seed(seed))
    return (near + moves).clamp(quantizer.active.qmin, quantizer.active.qmax)


@pytest.mark.parametrize("kind", [FreeWeight, SoftWeight])
@given(st.integers(0, 9), st.sampled_from(FORMATS), st.booleans())
def test_writing_what_was_not_trained_changes_nothing(
    kind: type[FreeWeight | SoftWeight], seed: int, number_format: NumberFormat, stored: bool
) -> None:
    weight = draw(6, 4, 3, seed=seed)
    quantizer = quantizer_of(weight, number_format)
    if stored:
        quantizer.set_codes(number_format, some_codes(weight, quantizer, seed))
    codes, scale = quantizer.codes(weight, number_format), quantizer.scale(number_format)
    value = quantizer(weight)
    variable = kind(quantizer, weight)
    if isinstance(variable, FreeWeight):
        assert torch.allclose(variable.value(), value, atol=1e-6)
    variable.write()
    assert torch.equal(quantizer.codes(weight, number_format), codes)
    assert torch.equal(quantizer.scale(number_format), scale)


@given(st.integers(0, 9), st.sampled_from(FORMATS))
def test_a_free_weight_deploys_what_it_trained(seed: int, number_format: NumberFormat) -> None:
    weight = draw(6, 4, 3, seed=seed)
    quantizer = quantizer_of(weight, number_format)
    variable = FreeWeight(quantizer, weight)
    with torch.no_grad():
        variable.steps += 3 * draw(6, 4, 3, seed=seed + 1)
        variable.scale_change += 0.1 * draw(*variable.scale_change.shape, seed=seed + 2)
    trained = variable.value().detach()
    variable.write()
    assert torch.allclose(quantizer(weight), trained, atol=1e-6)
    stored = quantizer.stored_codes(number_format)
    assert stored is not None
    assert stored.min() >= number_format.qmin
    assert stored.max() <= number_format.qmax


def test_a_free_weight_moves_any_number_of_steps() -> None:
    number_format = NumberFormat(4)
    weight = torch.tensor([[0.4, -0.3]])
    quantizer = quantizer_of(weight, number_format)
    quantizer.set_scale(number_format, torch.tensor([0.1]))
    variable = FreeWeight(quantizer, weight)
    wanted = torch.tensor([[-0.5, 0.6]])
    for _ in range(60):
        (variable.value() - wanted).square().sum().backward()
        with torch.no_grad():
            assert variable.steps.grad is not None
            variable.steps -= 0.5 * variable.steps.grad.sign()
            variable.steps.grad = None
    variable.write()
    assert (quantizer.codes(weight, number_format) - torch.tensor([[-5, 6]])).abs().max() <= 1


def test_scales_of_a_free_weight_get_the_gradient_of_learned_steps() -> None:
    number_format = NumberFormat(3)
    weight = draw(2, 8)
    quantizer = quantizer_of(weight, number_format)
    variable = FreeWeight(quantizer, weight)
    variable.value().sum().backward()
    scale = quantizer.scale(number_format)[:, None]
    exact = weight / scale
    inside = (exact > -4) & (exact < 3)
    by_scale = torch.where(inside, exact.round() - exact, exact.round().clamp(-4, 3))
    found = variable.scale_change.grad
    assert found is not None
    # The weight starts a hair inside its code where it was clipped: its end, not beyond.
    assert torch.allclose(found, (by_scale * scale).sum(dim=1), atol=0.3 * float(scale.max()))
    assert torch.equal(found.sign(), (by_scale * scale).sum(dim=1).sign())


@given(st.integers(0, 9), st.sampled_from(FORMATS))
def test_a_soft_weight_ends_on_one_of_its_two_codes(seed: int, number_format: NumberFormat) -> None:
    weight = draw(6, 4, 3, seed=seed)
    quantizer = quantizer_of(weight, number_format)
    spread = quantizer.spread_scale(weight, number_format)
    variable = SoftWeight(quantizer, weight)
    start = variable.value().detach()
    inside = (weight / spread > number_format.qmin) & (weight / spread < number_format.qmax)
    assert torch.allclose(start[inside], weight[inside], atol=1e-5)
    with torch.no_grad():
        variable.v.copy_(4 * draw(6, 4, 3, seed=seed + 1).sign())
    assert float(variable.penalty(2.0).detach()) == pytest.approx(0, abs=1e-4)
    soft = variable.value().detach()
    variable.write()
    assert torch.allclose(quantizer(weight), soft, atol=1e-6)
    moved = (quantizer(weight) - weight).abs() / spread
    assert moved[inside].max() <= 1 + 1e-5


UINT4 = NumberFormat(4, Scheme.AFFINE)


def range_of(
    scale: float, zero_point: int, is_symmetric: bool = False
) -> tuple[ActivationQuantizer, LearnedRange]:
    quantizer = ActivationQuantizer("x", [UINT4], is_symmetric)
    quantizer.ranges[UINT4.name] = ActivationRange(scale, zero_point)
    quantizer.activate(UINT4)
    return quantizer, LearnedRange(quantizer)


@given(st.floats(0.05, 0.5), st.integers(0, 15), st.floats(-0.5, 0.5), st.floats(-0.5, 0.5))
def test_a_range_deploys_what_it_trained(
    scale: float, zero_point: int, scale_change: float, centre_change: float
) -> None:
    quantizer, variable = range_of(scale, zero_point)
    x = draw(50)
    assert torch.allclose(variable(x), quantizer(x), atol=1e-5)
    with torch.no_grad():
        variable.scale_change += scale_change
        variable.centre_change += centre_change
    trained = variable(x).detach()
    variable.write()
    # A value in the middle between two codes may go either way.
    near = (trained - quantizer(x)).abs() < 1e-5
    assert near.float().mean() > 0.9
    found = quantizer.ranges[UINT4.name]
    assert found.scale == pytest.approx(scale * torch.tensor(scale_change).exp().item(), rel=1e-5)
    assert 0 <= found.zero_point <= 15


@pytest.mark.parametrize(("zero_point", "is_symmetric"), [(0, False), (15, False), (8, True)])
def test_a_zero_point_at_an_end_stays_and_a_symmetric_one(
    zero_point: int, is_symmetric: bool
) -> None:
    quantizer, variable = range_of(0.1, zero_point, is_symmetric)
    (variable(4 * draw(50)) - 4 * draw(50)).square().sum().backward()
    assert variable.scale_change.grad is not None
    assert variable.scale_change.grad < 0
    with torch.no_grad():
        variable.centre_change += 0.5
    variable.write()
    assert quantizer.ranges[UINT4.name].zero_point == zero_point


def test_a_range_learns_what_it_clipped() -> None:
    quantizer, variable = range_of(0.1, 8)
    x = torch.linspace(-0.5, 3, 200)
    before = (quantizer(x) - x).square().sum()
    for _ in range(200):
        (variable(x) - x).square().sum().backward()
        with torch.no_grad():
            for change in (variable.scale_change, variable.centre_change):
                assert change.grad is not None
                change.sub_(0.01 * change.grad.sign())
                change.grad = None
    variable.write()
    assert (quantizer(x) - x).square().sum() < before / 10
    assert quantizer.ranges[UINT4.name].zero_point < 5
