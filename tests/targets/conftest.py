"""What the converters of several targets are tested with."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

from fxmpq.graph.run import run_batch
from fxmpq.graph.trace import trace
from fxmpq.targets.convert import convert

Made = Callable[..., fx.GraphModule]


class Options(nn.Module):
    """Takes a tensor it does not need and options, returns several kinds of output."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(
        self, x: Tensor, unused: Tensor, scale: float = 1.0, flag: bool = False
    ) -> dict[str, Tensor]:
        y = self.fc(x) * scale
        return {"y": y, "label": y.argmax(-1), "x": x}


@pytest.fixture
def check_options(calibrated: Made, uniform: Made) -> Callable[[str], None]:
    """Checks a target on options, unused inputs and integer outputs."""

    def check(target: str) -> None:
        torch.manual_seed(0)
        batch = {"x": torch.randn(6, 4), "unused": torch.zeros(6, 2), "scale": 2.0, "flag": True}
        graph = uniform(calibrated(trace(Options(), batch), [batch], target), 2)
        made = convert(graph, verify=[batch])
        y, label, x = made.run(batch)
        assert torch.allclose(y, run_batch(graph, batch)[0], atol=1e-4)
        assert torch.equal(label, y.argmax(-1))
        assert torch.equal(x, batch["x"])

    return check
