"""A model with tied weights, for what trains."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

from fxmpq.formats import Precision
from fxmpq.graph.state import require
from fxmpq.graph.trace import trace
from fxmpq.training.fit import fit
from fxmpq.training.loss import classification_loss
from fxmpq.training.trainable import activate, trainable


class Tied(nn.Module):
    """An output layer that shares the embedding's weight, a layer called twice, and a GELU."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.mix = nn.Linear(6, 6)
        self.out = nn.Linear(6, 7, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        hidden = nn.functional.gelu(self.mix(self.embed(ids).relu()))
        return self.out(self.mix(hidden))


@pytest.fixture(scope="session")
def tied_model() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Tied()


@pytest.fixture(scope="session")
def ids() -> Tensor:
    return torch.arange(28).reshape(4, 7) % 7


Planned = Callable[..., fx.GraphModule]
Pair = tuple[Tensor, Tensor]


@pytest.fixture(scope="module")
def batches() -> list[Pair]:
    """Points in three classes that two lines divide."""
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(60, 4, generator=generator)
    labels = (points[:, 0] > 0).long() + (points[:, 1] + points[:, 2] > 0).long()
    return [(points[i : i + 12], labels[i : i + 12]) for i in range(0, 60, 12)]


@pytest.fixture(scope="module")
def graph(calibrated: Planned, batches: list[Pair]) -> fx.GraphModule:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))
    inputs = [batch[0] for batch in batches]
    return calibrated(trace(model, inputs[0]), inputs, candidates=[Precision(3, 4)])


def lowered(graph: fx.GraphModule) -> fx.GraphModule:
    copied = trainable(graph)
    for group in require(copied, stage="calibrated").groups:
        activate(copied, group, Precision(3, 4))
    return copied


def trained(graph: fx.GraphModule, batches: list[Pair], **options: object) -> list[Tensor]:
    copied = lowered(graph)
    settings = {"loss": classification_loss, "epochs": 2, "learning_rate": 0.05, **options}
    fit(copied, batches, **settings)
    return [parameter.detach() for parameter in copied.parameters()]
