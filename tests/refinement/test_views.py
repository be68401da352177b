from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from fxmpq.graph.state import copy_graph
from fxmpq.refinement.views import LayerView
from fxmpq.refinement.walk import Walk

Subject = Any


@pytest.fixture
def conv(subject_of: Callable[[str], Subject]) -> Subject:
    found = subject_of("conv")
    return type(found)(found.calibrated, copy_graph(found.planned), found.batches)


def layer(subject: Subject, name: str) -> LayerView:
    """The view of one layer, with the walk standing there."""
    views = Walk(subject.planned, subject.batches).layers()
    return next(view for view in views if view.layer.name == name)


def test_a_view_tells_what_there_is_of_its_layer(conv: Subject) -> None:
    view = layer(conv, "conv2")
    assert view.operator.kind == "conv"
    assert view.number_format == view.quantizer.active
    assert view.group.name == "conv2"
    assert len(view) == 2
    assert torch.equal(view.weight, conv.planned.get_parameter(view.layer.weight))
    assert not view.weight.requires_grad
    expected = view.quantizer.quantize(view.weight, view.number_format)
    assert torch.equal(view.quantized_weight, expected)
    shift = view.correction.shift(view.number_format)
    assert torch.equal(view.quantized_bias, view.float_bias + shift)
    assert set(view.modules) == {
        view.layer.weight_quantizer, view.layer.bias_correction, view.layer.input_quantizer
    }  # fmt: skip


def test_the_raw_input_becomes_the_input_by_its_quantizer(subject: Subject) -> None:
    quantized = 0
    for view in Walk(copy_graph(subject.planned), subject.batches).layers():
        for batch in range(len(view)):
            raw = view.raw_input(batch)
            if view.input_quantizer is None:
                assert torch.equal(raw, view.input(batch))
            else:
                quantized += 1
                found = view.input_quantizer.quantize(raw, view.input_quantizer.active)
                assert torch.equal(found, view.input(batch))
                assert not torch.equal(raw, view.input(batch))
    assert quantized


def test_the_error_is_the_definition(subject: Subject) -> None:
    for view in Walk(copy_graph(subject.planned), subject.batches).layers():
        outputs = [(view.float_output(b), view.quantized_output(b)) for b in range(len(view))]
        noise = sum(float((b - a).double().square().sum()) for a, b in outputs)
        signal = sum(float(a.double().square().sum()) for a, _ in outputs)
        assert view.error() == pytest.approx(noise / signal, rel=1e-5)
        assert view.error() > 0


def test_the_blocks_error_is_the_definition(subject: Subject) -> None:
    for view in Walk(copy_graph(subject.planned), subject.batches).blocks():
        outputs = [(view.float_output(b), view.output(b)) for b in range(len(view))]
        noise = sum(float((b - a).double().square().sum()) for a, b in outputs)
        signal = sum(float(a.double().square().sum()) for a, _ in outputs)
        assert view.error() == pytest.approx(noise / signal, rel=1e-5)
        assert view.name == view.layers[0].layer.name


def test_a_bias_can_be_set_where_there_was_none(plan_of: Callable[..., Subject]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4, bias=False))
    subject = plan_of(model, [torch.randn(5, 3)], ("w4a8",), target="reference")
    view = layer(subject, "0")
    assert view.float_bias is None
    before = view.quantized_output(0) - view.quantized_bias
    view.set_bias(torch.arange(4.0))
    assert torch.equal(view.quantized_bias, torch.arange(4.0))
    assert torch.allclose(view.quantized_output(0), before + torch.arange(4.0), atol=1e-6)
    assert torch.allclose(subject.planned(subject.batches[0]), view.quantized_output(0))


def test_a_bias_replaces_what_bias_correction_found(conv: Subject) -> None:
    view = layer(conv, "fc")
    wanted = torch.linspace(-1, 1, 5)
    view.set_bias(wanted)
    assert torch.allclose(view.quantized_bias, wanted, atol=1e-7)
    assert torch.equal(view.float_bias, conv.planned.get_parameter("fc.bias"))
    for batch, images in enumerate(conv.batches):
        assert torch.equal(conv.planned(images), view.quantized_output(batch))


def test_any_layer_runs_on_inputs_weights_and_biases_of_ones_own(subject: Subject) -> None:
    for view in Walk(copy_graph(subject.planned), subject.batches).layers():
        x, weight = view.input(0), view.quantized_weight
        one = view.output(x, weight, None)
        double = view.output(x, 2 * weight, None)
        torch.testing.assert_close(double, 2 * one)
        if view.operator.bias is None:
            assert view.correction is None
            assert view.float_bias is None
            continue
        bias = torch.arange(len(weight), dtype=torch.float32)
        shape = [1, -1, *([1] * (one.dim() - 2))] if view.operator.kind == "conv" else [-1]
        torch.testing.assert_close(view.output(x, weight, bias), one + bias.reshape(shape))


def test_gradients_reach_weight_bias_and_input(conv: Subject) -> None:
    view = layer(conv, "conv1")
    with torch.enable_grad():
        parts = [view.raw_input(0), view.quantized_weight, torch.zeros(16)]
        leaves = [part.clone().requires_grad_() for part in parts]
        view.output(*leaves).square().sum().backward()
    assert all(leaf.grad is not None and leaf.grad.abs().sum() > 0 for leaf in leaves)


def test_overrides_stand_in_for_quantizers_with_gradients(conv: Subject) -> None:
    views = Walk(conv.planned, conv.batches).blocks()
    block = next(view for view in views if view.name == "conv1")
    target = next(found for found in block.layers if found.layer.name == "conv2")
    with torch.enable_grad():
        weight = target.weight.clone().requires_grad_()
        scale = torch.ones((), requires_grad=True)
        given: list[Tensor] = []

        def shifted(bias: Tensor) -> Tensor:
            given.append(bias)
            return bias * scale

        overrides = {
            target.layer.weight_quantizer: lambda found: weight,
            target.layer.bias_correction: shifted,
        }
        loss = (block.output(1, overrides) - block.float_output(1)).square().sum()
        loss.backward()
    assert torch.equal(given[0], target.float_bias)
    assert weight.grad.abs().sum() > 0
    assert scale.grad.abs() > 0
    assert all(parameter.grad is None for parameter in conv.planned.parameters())
    own = target.quantizer.quantize(target.weight, target.number_format)
    same = {target.layer.weight_quantizer: lambda found: own}
    assert torch.equal(block.output(1, same), block.output(1))
    assert not torch.equal(block.output(1, overrides).detach(), block.output(1))


def test_a_float_target_knows_no_overrides_and_no_gradients(conv: Subject) -> None:
    block = next(iter(Walk(conv.planned, conv.batches).blocks()))
    with torch.enable_grad():
        assert not block.float_output(0).requires_grad


def test_an_output_of_zeros_has_no_relative_error(plan_of: Callable[..., Subject]) -> None:
    model = nn.Sequential(nn.Linear(3, 4))
    with torch.no_grad():
        model[0].weight.fill_(0.5)
        model[0].bias.zero_()
    batches = [torch.tensor([[1.0, -1.0, 0.0]])]
    subject = plan_of(model, batches, ("w4a8",), target="reference")
    view = layer(subject, "0")
    assert torch.equal(view.float_output(0), torch.zeros(1, 4))
    view.set_bias(torch.zeros(4))
    view.quantizer.set_codes(view.number_format, torch.tensor([[1, 0, 0]] * 4))
    assert view.error() == float("inf")
    view.quantizer.set_codes(view.number_format, torch.zeros(4, 3))
    assert view.error() == 0


def test_a_layer_runs_in_float_only_once(conv: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    floats: list[str] = []
    original = Walk._compute

    def counted(self: Walk, node: fx.Node, values: object, overrides: object, *rest: Any) -> object:
        if overrides is None and "conv2d" in str(node.target):
            floats.append(node.name)
        return original(self, node, values, overrides, *rest)

    monkeypatch.setattr(Walk, "_compute", counted)
    for view in Walk(conv.planned, conv.batches).layers():
        errors = {view.error() for _ in range(3)}
        outputs = [view.float_output(batch) for batch in (0, 1, 0)]
        assert len(errors) == 1
        assert outputs[0] is outputs[2]
    convolutions = [n for n in conv.planned.graph.nodes if "conv2d" in str(n.target)]
    assert sorted(floats) == sorted(node.name for node in convolutions for _ in conv.batches)
