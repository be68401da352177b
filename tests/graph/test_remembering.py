from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fxmpq.errors import TraceError
from fxmpq.graph.remembering import check_keeps_nothing, written_buffers
from fxmpq.graph.trace import trace


class Counting(nn.Module):
    """Counts its calls in a buffer, and may tell by its result how many there were."""

    def __init__(self, reads: str) -> None:
        super().__init__()
        self.reads = reads
        self.layer = nn.Linear(3, 2)
        self.norm = nn.BatchNorm1d(2)
        self.calls: Tensor
        self.register_buffer("calls", torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        if self.reads == "before":
            x = x + self.calls
        if self.reads == "a part":
            self.calls[0] += 1
        elif self.reads == "written anew":
            self.calls.copy_(x.mean(0))
        else:
            self.calls += 1
        if self.reads == "statistics":
            norm = self.norm
            x = nn.functional.batch_norm(x, norm.running_mean, norm.running_var, training=True)
        return x + self.calls if self.reads in ("after", "a part", "written anew") else x


@pytest.mark.parametrize("reads", ["before", "after", "a part"])
def test_a_model_that_remembers_its_calls_is_an_error(reads: str) -> None:
    with pytest.raises(TraceError, match="Counting writes to its buffer 'calls'"):
        trace(Counting(reads), torch.randn(4, 3))


@pytest.mark.parametrize("reads", ["nothing", "written anew", "statistics"])
def test_a_model_that_only_writes_is_none(reads: str) -> None:
    torch.manual_seed(0)
    model, x = Counting(reads).eval(), torch.randn(4, 3)
    graph = trace(model, x)
    assert float(model.calls.abs().sum()) == 0.0
    for _ in range(2):
        with torch.no_grad():
            expected = model(x)
        assert torch.equal(graph(x), expected)


def test_what_is_written_to_is_named() -> None:
    program = torch.export.export(Counting("after").eval(), (torch.randn(4, 3),), strict=False)
    graph = program.module(check_guards=False)
    assert written_buffers(graph) == {"calls"}
    check_keeps_nothing(graph, (), "Counting")
    with pytest.raises(TraceError, match="in the next call"):
        check_keeps_nothing(graph, written_buffers(graph), "Counting")


class ScaledOnce(nn.Module):
    """Scales its weight before its first call, and remembers that it did."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.is_scaled = nn.Linear(3, 2), False

    def forward(self, x: Tensor) -> Tensor:
        if not self.is_scaled:
            with torch.no_grad():
                self.layer.weight.div_(2)
        return self.layer(x)


def test_a_weight_that_is_scaled_once_is_scaled_in_the_graph() -> None:
    torch.manual_seed(0)
    model, x = ScaledOnce().eval(), torch.randn(4, 3)
    graph = trace(model, x)
    expected = nn.functional.linear(x, model.layer.weight / 2, model.layer.bias)
    assert torch.equal(graph(x), expected)
    assert torch.equal(graph(x), expected)
