from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from fxmpq.graph.passes.merge_weights import merge_weights


def get_attrs(graph: fx.GraphModule) -> list[str]:
    return [str(node.target) for node in graph.graph.nodes if node.op == "get_attr"]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.table(ids))


class Reused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.other = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.fc(self.fc(x)))


def by_name(model: nn.Module, table: str, head: str) -> fx.GraphModule:
    """Looks up in one weight and multiplies by another, each read under the given name."""
    nodes = fx.Graph()
    ids = nodes.placeholder("ids")
    rows = nodes.call_function(nn.functional.embedding, (ids, nodes.get_attr(table)))
    nodes.output(nodes.call_function(nn.functional.linear, (rows, nodes.get_attr(head))))
    return fx.GraphModule(model, nodes)


def test_tied_weights_are_read_by_the_first_name() -> None:
    model = Tied()
    graph = by_name(model, "table.weight", "head.weight")
    ids = torch.tensor([[1, 2], [3, 6]])
    assert merge_weights(graph) == 1
    assert get_attrs(graph) == ["table.weight"]
    assert torch.equal(graph(ids), model(ids))


def test_every_weight_is_read_once() -> None:
    model = Reused()
    program = torch.export.export(model, (torch.ones(2, 4),), strict=False)
    graph = program.module(check_guards=False)
    merge_weights(graph)
    assert sorted(get_attrs(graph)) == ["fc.bias", "fc.weight", "other.bias", "other.weight"]
    x = torch.randn(3, 4)[:2]
    assert torch.equal(graph(x), model(x))
    assert merge_weights(graph) == 0


def test_equal_values_are_not_the_same_weight() -> None:
    model = Tied()
    model.head.weight = nn.Parameter(model.table.weight.detach().clone())
    graph = by_name(model, "table.weight", "head.weight")
    assert merge_weights(graph) == 0
    assert get_attrs(graph) == ["table.weight", "head.weight"]


def test_a_submodule_is_no_weight() -> None:
    model = Tied()
    nodes = fx.Graph()
    nodes.output((nodes.get_attr("table"), nodes.get_attr("table")))
    assert merge_weights(fx.GraphModule(model, nodes)) == 0
