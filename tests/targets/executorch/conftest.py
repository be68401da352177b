from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

from fxmpq.formats import Precision
from fxmpq.graph.switch import with_choices
from fxmpq.graph.trace import trace
from fxmpq.targets.convert import convert
from fxmpq.targets.target import Converted

Made = Callable[..., fx.GraphModule]
Samples = list[tuple[Tensor, Tensor]]


class Net(nn.Module):
    """What the target runs: convolutions, a sum, pooling, linear layers, a look-up."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.even, self.odd = nn.Linear(8, 33), nn.Linear(33, 6)
        self.kept = nn.Linear(6, 5)
        self.table = nn.Embedding(50, 33)

    def forward(self, x: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.relu(self.first(x))
        x = nn.functional.max_pool2d(torch.relu(x + self.second(x)), 2)
        x = nn.functional.relu6(self.depthwise(x))
        x = torch.relu(self.even(x.mean((2, 3)))) + self.table(index)
        return self.kept(self.odd(x)), x


@pytest.fixture(scope="session")
def samples() -> Samples:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(4, 3, 8, 8, generator=generator), torch.arange(4) + i) for i in range(2)]


@pytest.fixture(scope="session")
def net_plan(calibrated: Made, samples: Samples) -> fx.GraphModule:
    torch.manual_seed(0)
    candidates = [Precision.parse(name) for name in ("w4a8", "w8a8")]
    traced = trace(Net().eval(), samples[0])
    graph = calibrated(traced, samples, "executorch", candidates=candidates, exclude=["kept"])
    choices = dict.fromkeys(["first", "second", "depthwise"], "w8a8")
    others = {"even": "w4a8", "odd": "w4a8", "table": "w4", "kept": "fp32"}
    return with_choices(graph, {**choices, **others})


@pytest.fixture(scope="session")
def made_net(
    net_plan: fx.GraphModule, samples: Samples, tmp_path_factory: pytest.TempPathFactory
) -> Converted:
    return convert(net_plan, output=tmp_path_factory.mktemp("pte"), verify=samples)
