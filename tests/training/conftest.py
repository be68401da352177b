"""A model with tied weights, for what trains."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn


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
