from __future__ import annotations

import torch
from torch import fx, nn

from fxmpq.graph.inserting import Inserter

aten = torch.ops.aten


def exported() -> tuple[fx.GraphModule, fx.Node]:
    program = torch.export.export(nn.ReLU(), (torch.randn(2, 3),), strict=False)
    graph = program.module(check_guards=False)
    [relu] = graph.graph.find_nodes(op="call_function", target=aten.relu.default)
    return graph, relu


def test_a_call_stands_before_the_node_with_the_value_it_has() -> None:
    graph, relu = exported()
    found = Inserter(graph, relu)(aten.transpose.int, relu.args[0], 0, 1)
    assert found.next is relu
    assert tuple(found.meta["val"].shape) == (3, 2)
    assert found.meta["nn_module_stack"] == relu.meta["nn_module_stack"]
    assert relu.meta["val"].shape == (2, 3)


def test_a_replacement_takes_the_readers_and_the_value() -> None:
    graph, relu = exported()
    value, source = relu.meta["val"], relu.args[0]
    found = Inserter(graph, relu).replace(aten.sigmoid.default, source)
    graph.recompile()
    assert relu not in graph.graph.nodes
    assert found.meta["val"] is value
    x = torch.randn(2, 3)
    assert torch.equal(graph(x), x.sigmoid())
