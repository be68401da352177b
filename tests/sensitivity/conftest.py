from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from fxmpq.formats import Precision
from fxmpq.graph.trace import trace

Calibrated = Callable[..., fx.GraphModule]
Pairs = list[tuple[Tensor, Tensor]]


def squared(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (model(batch[0]) - batch[1]).square().sum(1).mean()


def pairs(*sizes: int, inputs: int = 4, classes: int = 3) -> Pairs:
    generator = torch.Generator().manual_seed(0)
    return [
        (
            torch.randn(size, inputs, generator=generator),
            torch.randint(0, classes, (size,), generator=generator),
        )
        for size in sizes
    ]


def graph_of(model: nn.Module, batches: Pairs, calibrated: Calibrated) -> fx.GraphModule:
    inputs = [batch[0] for batch in batches]
    return calibrated(trace(model.eval(), inputs[0]), inputs, candidates=[Precision(4, 8)])


class Smooth(nn.Module):
    """Two layers, the first with curvature of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return functional.cross_entropy(model(batch[0]).double(), batch[1])


def labelled_batches() -> Pairs:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(samples, 6, generator=generator),
            torch.randint(0, 3, (samples,), generator=generator),
        )
        for samples in (12, 5)
    ]


def four_layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU()),
        nn.Linear(8, 3),
    ).eval()
