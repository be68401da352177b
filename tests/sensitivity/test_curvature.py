from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from fxmpq.formats import Precision
from fxmpq.graph.state import state_of
from fxmpq.quantizers.modules import ActivationQuantizer
from fxmpq.sensitivity.curvature import Curvature
from fxmpq.training.loss import classification_loss

from .conftest import Pairs, Smooth, graph_of, pairs, squared

Calibrated = Callable[..., fx.GraphModule]


def mean_and_error(
    curvature: Curvature, batches: Pairs, parts: list[tuple[str, ...]], draws: int
) -> tuple[np.ndarray, np.ndarray]:
    rows = [curvature.draw(batches, parts, seed=0, number=number) for number in range(draws)]
    return np.mean(rows, axis=0), np.std(rows, axis=0, ddof=1) / np.sqrt(draws)


class Tied(nn.Module):
    """One weight, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(torch.tanh(self.layer(x))))


class Untied(nn.Module):
    """The same function of weights of its own."""

    def __init__(self, tied: Tied) -> None:
        super().__init__()
        self.first, self.second = copy.deepcopy(tied.layer), copy.deepcopy(tied.layer)
        self.head = tied.head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(torch.tanh(self.first(x))))


def weight_trace(model: nn.Module, name: str, batches: Pairs) -> float:
    """Mean diagonal of the explicit Hessian of the mean loss over all samples."""
    whole = torch.cat([b[0] for b in batches]), torch.cat([b[1] for b in batches])
    weight = model.get_parameter(name).detach()

    def loss(flat: Tensor) -> Tensor:
        swapped = {name: flat.view_as(weight)}
        outputs = torch.func.functional_call(model, swapped, (whole[0],))
        return functional.cross_entropy(outputs, whole[1])

    return float(torch.autograd.functional.hessian(loss, weight.flatten()).diagonal().mean())


def activation_trace(rest: Callable[[Tensor], Tensor], values: Tensor, labels: Tensor) -> float:
    """Mean over samples of the mean diagonal of the sample's explicit Hessian."""
    found = [
        torch.autograd.functional.hessian(
            lambda row, label=label: functional.cross_entropy(rest(row)[None], label[None]), value
        ).diagonal()
        for value, label in zip(values, labels, strict=True)
    ]
    return float(torch.stack(found).mean())


@pytest.mark.parametrize("together", [False, True])
def test_converges_to_explicit_hessians(calibrated: Calibrated, together: bool) -> None:
    torch.manual_seed(0)
    model, batches = Smooth(), pairs(6, 3)
    curvature = Curvature(
        graph_of(model, batches, calibrated), classification_loss, activations=True
    )
    blocks = (*curvature.weights, *curvature.activations)
    parts = [blocks] if together else [(name,) for name in blocks]
    mean, error = mean_and_error(curvature, batches, parts, draws=200)
    x = torch.cat([batch[0] for batch in batches])
    labels = torch.cat([batch[1] for batch in batches])
    hidden = torch.tanh(model.first(x)).detach()
    expected = np.array(
        [
            weight_trace(model, "first.weight", batches),
            weight_trace(model, "second.weight", batches),
            activation_trace(model, x, labels),
            activation_trace(model.second, hidden, labels),
        ]
    )
    assert (error < 0.15 * np.abs(expected).max()).all()
    assert (np.abs(mean - expected) < 4 * error).all()


def test_drawing_one_block_at_a_time_varies_less(calibrated: Calibrated) -> None:
    torch.manual_seed(0)
    batches = pairs(8)
    curvature = Curvature(
        graph_of(Smooth(), batches, calibrated), classification_loss, activations=False
    )
    apart = [(name,) for name in curvature.weights]
    _, alone = mean_and_error(curvature, batches, apart, draws=60)
    _, joint = mean_and_error(curvature, batches, [curvature.weights], draws=60)
    assert (alone < joint).all()


def test_a_tied_weight_counts_the_terms_between_its_calls(calibrated: Calibrated) -> None:
    torch.manual_seed(0)
    model, batches = Tied(), pairs(8)
    curvature = Curvature(
        graph_of(model, batches, calibrated), classification_loss, activations=False
    )
    assert len(curvature.weights) == 2
    mean, error = mean_and_error(curvature, batches, [(curvature.weights[0],)], draws=200)
    untied = Untied(model)
    apart = sum(weight_trace(untied, f"{name}.weight", batches) for name in ("first", "second"))
    expected = weight_trace(model, "layer.weight", batches)
    assert abs(mean[0] - expected) < 4 * error[0]
    assert abs(mean[0] - apart) > 5 * error[0]


def test_logistic_regression_in_closed_form(calibrated: Calibrated) -> None:
    torch.manual_seed(0)
    model, batches = nn.Linear(4, 3), pairs(10)
    x, _ = batches[0]
    curvature = Curvature(
        graph_of(model, batches, calibrated), classification_loss, activations=True
    )
    parts = [curvature.weights, curvature.activations]
    mean, error = mean_and_error(curvature, batches, parts, draws=200)
    shares = model(x).softmax(1).detach()
    # H = mean (diag(p) - p p^T) (x) x x^T; with respect to x, W^T (diag(p) - p p^T) W.
    spread = torch.diag_embed(shares) - shares[:, :, None] * shares[:, None, :]
    inside = torch.einsum("oi,nop,pi->n", model.weight, spread, model.weight).mean() / 4
    outside = (spread.diagonal(dim1=1, dim2=2).sum(1) * x.square().sum(1)).mean() / 12
    expected = np.array([float(outside), float(inside.detach())])
    assert (error < 0.1 * expected).all()
    assert (np.abs(mean - expected) < 4 * error).all()


@settings(max_examples=8)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=6), st.integers(0, 2**70))
def test_diagonal_hessians_are_exact_in_one_draw(
    calibrated: Calibrated, columns: list[int], seed: int
) -> None:
    x = functional.one_hot(torch.tensor(columns), 4).float() * 3
    model = nn.Linear(4, 4, bias=False)
    with torch.no_grad():
        model.weight.copy_(2 * torch.eye(4))
    batches = [(x, torch.ones(len(x), 4))]
    graph = graph_of(model, [(x, x)] if len(x) > 1 else [(x.repeat(2, 1), x)], calibrated)
    curvature = Curvature(graph, squared, activations=True)
    parts = [curvature.weights, curvature.activations]
    # L = mean ||W x - y||^2: H = 2 mean(x x^T) for each output, and 2 W^T W for each input.
    weight, value = curvature.draw(batches, parts, seed=seed, number=0)
    assert weight == pytest.approx(2 * 9 / 4, rel=1e-5)
    assert value == pytest.approx(2 * 4, rel=1e-5)


def test_batches_count_by_their_samples(calibrated: Calibrated) -> None:
    big, small = (torch.eye(4).repeat(2, 1), torch.ones(8, 2)), (3 * torch.eye(4), torch.ones(4, 2))
    graph = graph_of(nn.Linear(4, 2), [big], calibrated)
    curvature = Curvature(graph, squared, activations=False)

    def found(*batches: tuple[Tensor, Tensor]) -> float:
        return curvature.draw(batches, [curvature.weights], seed=0, number=0)[0]

    assert found(big, small) == pytest.approx((2 * found(big) + found(small)) / 3)
    assert found(small) == pytest.approx(9 * found(big))


def test_a_loss_that_runs_the_model_twice(calibrated: Calibrated) -> None:
    x, y = 2 * torch.eye(4), torch.ones(4, 2)
    graph = graph_of(nn.Linear(4, 2), [(x, y)], calibrated)

    def halves(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        parts = zip(batch[0].split(2), batch[1].split(2), strict=True)
        return torch.stack([squared(model, part) for part in parts]).mean()

    def draw(loss: Callable[..., Tensor]) -> list[float]:
        curvature = Curvature(graph, loss, activations=True)
        return curvature.draw([(x, y)], [curvature.weights], seed=0, number=0)

    assert draw(halves) == pytest.approx(draw(squared))
    both, one = (Curvature(graph, loss, activations=True) for loss in (halves, squared))
    assert both.noise([(x, y)]) == pytest.approx(one.noise([(x, y)]))


def test_noise_is_the_mean_over_samples(calibrated: Calibrated) -> None:
    torch.manual_seed(0)
    batches = pairs(6, 2)
    graph = graph_of(Smooth(), batches, calibrated)
    curvature = Curvature(graph, classification_loss, activations=True)
    quantizer = graph.get_submodule(curvature.activations[0])
    assert isinstance(quantizer, ActivationQuantizer)
    x = torch.cat([batch[0] for batch in batches])
    expected = [
        float((quantizer.quantize(x, f) - x).square().sum(1).mean()) for f in quantizer.formats
    ]
    assert curvature.noise(batches)[: len(expected)] == pytest.approx(expected)


def test_attention_against_an_explicit_hessian(
    calibrated: Calibrated,
    bert: nn.Module,
    bert_graph: fx.GraphModule,
    token_batches: list[dict[str, Tensor]],
) -> None:
    labels = torch.tensor([0, 1, 2, 1])
    batches = [(batch, labels) for batch in token_batches[:1]]
    graph = calibrated(bert_graph, token_batches, candidates=[Precision(8, 8)])

    def loss(model: nn.Module, batch: tuple[dict[str, Tensor], Tensor]) -> Tensor:
        return functional.cross_entropy(model(**batch[0]).logits, batch[1])

    curvature = Curvature(graph, loss, activations=False)
    layer = next(
        layer
        for group in state_of(graph).groups
        for layer in group.layers
        if layer.name.endswith("layer.1.attention.self.query")
    )
    assert layer.weight_quantizer is not None
    mean, error = mean_and_error(curvature, batches, [(layer.weight_quantizer,)], draws=150)
    weight = bert.get_parameter(layer.weight).detach()

    def of_weight(flat: Tensor) -> Tensor:
        named = {layer.weight: flat.view_as(weight)}
        found = torch.func.functional_call(bert, named, (), dict(token_batches[0]))
        return functional.cross_entropy(found.logits, labels)

    with sdpa_kernel(SDPBackend.MATH):
        expected = torch.autograd.functional.hessian(of_weight, weight.flatten()).diagonal().mean()
    assert abs(mean[0] - float(expected)) < 4 * error[0]
    assert error[0] < 0.35 * abs(float(expected))
