from __future__ import annotations

import pytest
import torch
from torch import fx, nn

from fxmpq.errors import TraceError
from fxmpq.graph.legality import check_canonical, check_prepared
from fxmpq.graph.prepare import insert_quantizers
from fxmpq.graph.state import copy_graph
from fxmpq.targets.reference import REFERENCE

aten = torch.ops.aten


def first_layer(graph: fx.GraphModule) -> fx.Node:
    return next(node for node in graph.graph.nodes if node.target is aten.conv2d.default)


def module_names(graph: fx.GraphModule) -> set[str]:
    return {str(node.target) for node in graph.graph.nodes if node.op == "call_module"}


def test_traced_graphs_are_canonical(
    conv_graph: fx.GraphModule, bert_graph: fx.GraphModule, resnet_graph: fx.GraphModule
) -> None:
    for graph in (conv_graph, bert_graph, resnet_graph):
        check_canonical(graph)


def test_a_module_call_is_not_canonical() -> None:
    graph = fx.symbolic_trace(nn.Sequential(nn.ReLU()))
    with pytest.raises(TraceError, match="is a call_module; a canonical graph has none"):
        check_canonical(graph)


def test_a_method_call_is_not_canonical() -> None:
    class Method(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.relu()

    with pytest.raises(TraceError, match="'relu' is a call_method"):
        check_canonical(fx.symbolic_trace(Method()))


def test_a_write_is_not_canonical(conv_graph: fx.GraphModule) -> None:
    graph = copy_graph(conv_graph)
    relu = next(node for node in graph.graph.nodes if node.target is aten.relu.default)
    relu.target = aten.relu_.default
    with pytest.raises(TraceError, match=r"aten.relu_.default\) writes to its arguments"):
        check_canonical(graph)


def test_a_layer_with_keyword_operands_is_not_canonical(conv_graph: fx.GraphModule) -> None:
    graph = copy_graph(conv_graph)
    node = first_layer(graph)
    node.kwargs = {"weight": node.args[1]}
    node.args = node.args[:1]
    with pytest.raises(TraceError, match="has no positional input and weight"):
        check_canonical(graph)


def test_a_prepared_graph_calls_its_quantizers_once(conv_graph: fx.GraphModule) -> None:
    graph = insert_quantizers(conv_graph, REFERENCE.rules)
    names = frozenset(module_names(graph))
    check_prepared(graph, names)
    with pytest.raises(TraceError, match=r"differ: \['quantizers.other'\]"):
        check_prepared(graph, names | {"quantizers.other"})
    with pytest.raises(TraceError, match="quantizers of graph and groups differ"):
        check_prepared(graph, names - {min(names)})


def test_a_quantizer_that_is_called_twice_is_illegal(conv_graph: fx.GraphModule) -> None:
    graph = insert_quantizers(conv_graph, REFERENCE.rules)
    call = next(node for node in graph.graph.nodes if node.op == "call_module")
    with graph.graph.inserting_after(call):
        graph.graph.call_module(str(call.target), call.args)
    with pytest.raises(TraceError, match="called twice"):
        check_prepared(graph, frozenset(module_names(graph)))
