from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from scipy.stats import kendalltau
from torch import Tensor, fx, nn
from torch.nn import functional

from fxmpq.formats import Precision
from fxmpq.graph.state import state_of
from fxmpq.graph.trace import trace
from fxmpq.quantizers.modules import WeightQuantizer
from fxmpq.sensitivity.curvature import Curvature
from fxmpq.sensitivity.hessian import hessian
from fxmpq.sensitivity.sqnr import sqnr
from fxmpq.training.loss import classification_loss

from .conftest import squared

Calibrated = Callable[..., fx.GraphModule]


def test_excluded_groups_have_no_score(
    calibrated: Calibrated, conv_graph: fx.GraphModule, images: list[Tensor]
) -> None:
    graph = calibrated(conv_graph, images, exclude=["conv1"])
    batches = [(batch, torch.arange(len(batch)) % 5) for batch in images]
    found = hessian(graph, batches, loss=classification_loss, probes=1)
    assert found.values["conv1"] == {"fp32": 0.0}
    assert list(found.values) == [group.name for group in state_of(graph).groups]
    everything = calibrated(conv_graph, images, exclude=["*"])
    silent = hessian(everything, batches, loss=classification_loss)
    assert all(row == {"fp32": 0.0} for row in silent.values.values())


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x))


def test_a_shared_weight_counts_once(calibrated: Calibrated) -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 4)
    graph = calibrated(trace(Twice().eval(), x), [x], candidates=[Precision(4)])
    batches = [(x, torch.zeros(6, 4))]
    curvature = Curvature(graph, squared, activations=False)
    (group,) = state_of(graph).groups
    assert len(group.layers) == 2
    (trace_,) = curvature.draw(batches, [curvature.weights], seed=0, number=0)
    quantizer = graph.get_submodule(curvature.weights[0])
    assert isinstance(quantizer, WeightQuantizer)
    weight = graph.get_parameter(group.layers[0].weight)
    error = quantizer.quantize(weight, quantizer.formats[0]) - weight
    found = hessian(graph, batches, loss=squared, probes=1)
    expected = abs(trace_) * float(error.square().sum().detach())
    assert found.value(group.name, "w4") == pytest.approx(expected, rel=1e-5)


def test_agrees_with_the_exact_sweep_at_a_minimum(
    calibrated: Calibrated, conv_graph: fx.GraphModule, images: list[Tensor]
) -> None:
    candidates = [Precision.parse(name) for name in ("w2a8", "w4a8", "w8a8")]
    graph = calibrated(conv_graph, images, candidates=candidates)
    # The distance to the float outputs: its Hessian is what moves the outputs.
    with torch.no_grad():
        batches = [(batch, graph(batch)) for batch in images]
    found, exact = hessian(graph, batches, loss=squared, probes=6), sqnr(graph, images)
    values = [(found.value(*entry), exact.value(*entry)) for entry in exact.entries]
    assert kendalltau(*zip(*values, strict=True)).statistic > 0.6


def test_bert_in_inference_mode(
    calibrated: Calibrated, bert_graph: fx.GraphModule, token_batches: list[dict[str, Tensor]]
) -> None:
    graph = calibrated(bert_graph, token_batches, candidates=[Precision(2, 8), Precision(8, 8)])
    batches = [{**batch, "labels": torch.tensor([0, 1, 2, 1])} for batch in token_batches]

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        outputs = model(batch["input_ids"], attention_mask=batch["attention_mask"])
        return functional.cross_entropy(outputs.logits, batch["labels"])

    with torch.inference_mode():
        found = hessian(graph, batches, loss=loss, probes=2)
    assert found.values == hessian(graph, batches, loss=loss, probes=2).values
    assert all(row[min(row)] > row[max(row)] > 0 for row in found.values.values())
    assert "w2" in found.values["bert.embeddings.word_embeddings"]
