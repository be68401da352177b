from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

from fxmpq.errors import CalibrationError, FxmpqError
from fxmpq.graph.run import run_batch
from fxmpq.graph.state import state_of
from fxmpq.graph.switch import with_choices
from fxmpq.sensitivity.curvature import Curvature
from fxmpq.training.loss import classification_loss

from .conftest import Smooth, graph_of, pairs

Calibrated = Callable[..., fx.GraphModule]


def test_an_applied_plan_is_switched_off_first(calibrated: Calibrated) -> None:
    torch.manual_seed(0)
    batches = pairs(6)
    graph = graph_of(Smooth(), batches, calibrated)
    planned = with_choices(graph, {group.name: "w4a8" for group in state_of(graph).groups})
    one, two = (Curvature(g, classification_loss, activations=True) for g in (graph, planned))
    draws = [c.draw(batches, [c.weights, c.activations], seed=0, number=0) for c in (one, two)]
    assert draws[0] == draws[1]


def test_inference_mode_and_batches_made_in_it(calibrated: Calibrated) -> None:
    torch.manual_seed(0)
    batches = pairs(6)
    graph = graph_of(Smooth(), batches, calibrated)
    curvature = Curvature(graph, classification_loss, activations=True)
    parts = [curvature.weights, curvature.activations]
    outside = curvature.draw(batches, parts, seed=0, number=0)
    with torch.inference_mode():
        inner = [(x.clone(), y.clone()) for x, y in batches]
        assert curvature.draw(inner, parts, seed=0, number=0) == outside


def test_the_graph_stays_as_it_was(calibrated: Calibrated) -> None:
    torch.manual_seed(0)
    batches = pairs(6)
    graph = graph_of(Smooth(), batches, calibrated)
    before = run_batch(graph, batches[0][0])[0]
    curvature = Curvature(graph, classification_loss, activations=True)
    curvature.draw(batches, [curvature.weights], seed=0, number=0)
    assert not any(module._forward_hooks for module in graph.modules())
    assert all(parameter.grad is None for parameter in graph.parameters())
    assert torch.equal(run_batch(graph, batches[0][0])[0], before)


def fused(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Has a first derivative, but PyTorch has no second one of its operator."""
    x = model(batch[0])[None, None]
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return attend(x, x, x)[0].square().sum()


def rough(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """PyTorch has no derivative of this operator at all."""
    x = model(batch[0]).exp() + 2
    return torch.special.zeta(x, x).sum()


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda model, batch: model(batch[0]), r"scalar tensor.*found a tensor of \[6, 3\]"),
        (
            lambda model, batch: float(model(batch[0]).detach().sum()),
            "scalar tensor.*found .*[0-9]",
        ),
        (lambda model, batch: model(batch[0]).detach().sum(), "no gradient"),
        (lambda model, batch: batch[0].sum(), "without running the model"),
        (fused, "differentiated twice.*'projected'"),
        (rough, "differentiated twice.*'projected'"),
    ],
)
def test_losses_without_a_hessian_are_errors(
    calibrated: Calibrated, loss: Callable[..., Tensor], message: str
) -> None:
    batches = pairs(6)
    curvature = Curvature(graph_of(Smooth(), batches, calibrated), loss, activations=True)
    with pytest.raises(FxmpqError, match=message):
        curvature.draw(batches, [curvature.weights], seed=0, number=0)


def test_an_error_inside_the_loss_comes_through(calibrated: Calibrated) -> None:
    def fails(model: nn.Module, batch: object) -> Tensor:
        raise RuntimeError("no such label")

    batches = pairs(6)
    curvature = Curvature(graph_of(Smooth(), batches, calibrated), fails, activations=True)
    with pytest.raises(RuntimeError, match="no such label"):
        curvature.draw(batches, [curvature.weights], seed=0, number=0)


def test_a_second_derivative_that_is_not_finite_is_an_error(calibrated: Calibrated) -> None:
    def steep(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return ((model(batch[0]) * 0).abs() ** 1.5).sum()

    batches = pairs(6)
    curvature = Curvature(graph_of(Smooth(), batches, calibrated), steep, activations=False)
    with pytest.raises(CalibrationError, match="NaN or infinite"):
        curvature.draw(batches, [curvature.weights], seed=0, number=0)


def test_a_linear_loss_has_no_curvature_in_its_last_layer(calibrated: Calibrated) -> None:
    torch.manual_seed(0)
    batches = pairs(6)
    graph = graph_of(Smooth(), batches, calibrated)
    curvature = Curvature(graph, lambda model, batch: model(batch[0]).sum(), activations=True)
    parts = [(name,) for name in curvature.weights]
    first, last = curvature.draw(batches, parts, seed=0, number=0)
    assert last == 0.0
    assert first != 0.0
