from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from fxmpq.graph.passes.make_functional import make_functional

aten = torch.ops.aten


def exported(model: nn.Module, *example: Tensor) -> fx.GraphModule:
    return torch.export.export(model, example, strict=False).module(check_guards=False)


def targets(graph: fx.GraphModule) -> list[object]:
    return [node.target for node in graph.graph.nodes if node.op == "call_function"]


class LaterReaders(nn.Module):
    """Reads the same name before and after two writes."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + 0
        before = x * 10
        x.add_(1)
        between = x * 100
        torch.relu_(x)
        return before + between + x


def test_later_readers_see_the_new_value() -> None:
    x = torch.tensor([[-3.0, 0.5], [2.0, -0.25]])
    expected = LaterReaders()(x)
    graph = exported(LaterReaders(), x)
    assert make_functional(graph) == 2
    assert aten.add_.Tensor not in targets(graph)
    assert aten.relu_.default not in targets(graph)
    assert torch.equal(graph(x), expected)


def test_the_result_of_a_write_is_the_written_name() -> None:
    class Chained(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x * 1
            z = y.mul_(2).add_(1)
            return y + z

    x = torch.randn(2, 3)
    graph = exported(Chained(), x)
    assert make_functional(graph) == 2
    assert torch.equal(graph(x), 2 * (2 * x + 1))


def test_the_input_is_not_written() -> None:
    class Writes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x.clamp_(0, 1)
            return x * 2

    x = torch.tensor([[-1.0, 0.5, 3.0]])
    graph = exported(Writes(), x.clone())
    make_functional(graph)
    assert graph(x).tolist() == [[0.0, 1.0, 2.0]]
    assert x.tolist() == [[-1.0, 0.5, 3.0]]


def test_pure_graphs_are_left_alone() -> None:
    graph = exported(nn.Sequential(nn.Linear(3, 3), nn.ReLU()), torch.ones(2, 3))
    before = targets(graph)
    assert make_functional(graph) == 0
    assert targets(graph) == before


def test_dunder_operators_and_python_functions_are_not_taken_for_writes() -> None:
    class Dunder(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x & 3

    x = torch.arange(6).reshape(2, 3)
    graph = exported(Dunder(), x)
    assert make_functional(graph) == 0
    assert torch.equal(graph(x), x & 3)


def test_readers_of_the_old_name_behind_a_write_are_moved() -> None:
    # torch.export names the written value itself; a graph from elsewhere need not.
    nodes = fx.Graph()
    x = nodes.placeholder("x")
    y = nodes.call_function(aten.mul.Tensor, (x, 1))
    before = nodes.call_function(aten.mul.Tensor, (y, 10))
    written = nodes.call_function(aten.add_.Tensor, (y, 1))
    after = nodes.call_function(aten.add.Tensor, (before, y))
    nodes.output(after)
    graph = fx.GraphModule(nn.Module(), nodes)
    value = torch.tensor([1.0, -2.0])
    expected = graph(value)
    assert make_functional(graph) == 1
    assert after.args == (before, written)
    assert torch.equal(graph(value), expected)


def test_an_operator_over_lists_is_not_taken_for_a_write() -> None:
    nodes = fx.Graph()
    x = nodes.placeholder("x")
    nodes.call_function(aten._foreach_add_.Scalar, ([x], 1))
    nodes.output(x)
    assert make_functional(fx.GraphModule(nn.Module(), nodes)) == 0
