from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, fx, nn

from fxmpq.graph.trace import trace
from fxmpq.quantizers.modules import ActivationQuantizer, BiasCorrection
from fxmpq.targets.equal_calls import value_numbers

Made = Callable[..., fx.GraphModule]


class Calls(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.next = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        one, other = self.fc(x), self.fc(x)
        return self.next(one.relu()) + self.next(other.relu()), self.fc(x * 2)


@pytest.fixture
def planned(calibrated: Made, uniform: Made) -> fx.GraphModule:
    torch.manual_seed(0)
    x = torch.randn(4, 6)
    return uniform(calibrated(trace(Calls(), x), [x], "onnxruntime"))


def test_equal_calls_have_one_number_through_their_quantizers(planned: fx.GraphModule) -> None:
    numbers = value_numbers(planned)
    one, other, one_next, other_next, doubled = (
        numbers[node.name]
        for node in planned.graph.nodes
        if node.target is torch.ops.aten.linear.default
    )
    assert one == other
    assert one_next == other_next
    assert len({one, one_next, doubled}) == 3


def test_another_grid_is_another_value(planned: fx.GraphModule) -> None:
    modules = [m for m in planned.modules() if isinstance(m, ActivationQuantizer) and m.active]
    reads_second = modules[2]
    assert reads_second.active is not None
    found = reads_second.ranges[reads_second.active.name]
    before = value_numbers(planned)
    wider = replace(found, scale=2 * found.scale)
    reads_second.ranges[reads_second.active.name] = wider
    after = value_numbers(planned)
    assert len(set(after.values())) > len(set(before.values()))


def test_another_shift_of_the_bias_is_another_value(planned: fx.GraphModule) -> None:
    shifted = [m for m in planned.modules() if isinstance(m, BiasCorrection) and m.active]
    before = len(set(value_numbers(planned).values()))
    for count, module in enumerate(shifted[:2]):
        assert module.active is not None
        module.set_shift(module.active, torch.full((6,), float(count)))
    assert len(set(value_numbers(planned).values())) > before


def test_another_rounding_of_the_bias_is_another_value(planned: fx.GraphModule) -> None:
    before = len(set(value_numbers(planned).values()))
    first = next(module for module in planned.modules() if isinstance(module, BiasCorrection))
    first.set_rounding(torch.full((6,), 0.5))
    assert len(set(value_numbers(planned).values())) > before


class Random(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand_like(x) * torch.rand_like(x)


def test_random_numbers_are_never_the_same() -> None:
    graph = trace(Random(), torch.randn(3))
    drawn = [node.name for node in graph.graph.nodes if "rand" in str(node.target)]
    assert len(drawn) == 2
    numbers = value_numbers(graph)
    assert numbers[drawn[0]] != numbers[drawn[1]]
