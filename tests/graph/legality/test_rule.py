from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx

from fxmpq.errors import FxmpqError
from fxmpq.graph.legality.rule import Subject, called
from fxmpq.graph.state import copy_graph, state_of


def test_tables_hold_what_the_graph_holds(
    conv_graph: fx.GraphModule, images: list[Tensor], calibrated: Callable[..., fx.GraphModule]
) -> None:
    graph = calibrated(conv_graph, images)
    subject = Subject(graph, state_of(graph))
    assert list(subject.nodes.values()) == list(graph.graph.nodes)
    assert subject.modules["quantizers.weight_fc_weight"] is graph.get_submodule(
        "quantizers.weight_fc_weight"
    )
    assert all(node.op == "call_module" for node in subject.calls.values())
    assert [layer.name for _, layer in subject.layers] == [
        layer.name for group in state_of(graph).groups for layer in group.layers
    ]
    assert subject.nodes is subject.nodes


def test_stored_tensors_are_found_and_nothing_else(conv_graph: fx.GraphModule) -> None:
    graph = copy_graph(conv_graph)
    graph.register_buffer("offset", torch.ones(1))
    graph.plain = torch.ones(1)
    subject = Subject(graph)
    nodes = {str(node.target): node for node in graph.graph.find_nodes(op="get_attr")}
    assert subject.stored(nodes["fc.weight"]) is graph.get_parameter("fc.weight")
    for name, expected in (("offset", graph.offset), ("plain", None), ("no.such", None)):
        assert subject.stored(fx.Node(graph.graph, name, "get_attr", name, (), {})) is expected
    (x,) = graph.graph.find_nodes(op="placeholder")
    assert subject.stored(x) is None
    assert subject.stored(3) is None


def test_a_graph_without_a_state_says_so(conv_graph: fx.GraphModule) -> None:
    with pytest.raises(FxmpqError, match="has no state yet"):
        _ = Subject(conv_graph).state


def test_nodes_are_named_with_what_they_call(conv_graph: fx.GraphModule) -> None:
    nodes = {node.op: node for node in reversed(conv_graph.graph.nodes)}
    assert called(nodes["call_function"]) == "'conv2d' (aten.conv2d.default)"
    assert called(nodes["placeholder"]) == "'x'"
