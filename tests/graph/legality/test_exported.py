from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

from fxmpq.graph.legality.exported import (
    EXPORTED,
    FUNCTIONS,
    NO_LITERALS,
    PURE,
    REGISTERED,
    SOUND,
    VALUED,
)
from fxmpq.graph.legality.rule import Rule, Subject
from fxmpq.graph.state import copy_graph
from fxmpq.graph.trace import trace

aten = torch.ops.aten
Plant = Callable[[fx.GraphModule], None]


def first(graph: fx.GraphModule, target: object) -> fx.Node:
    return next(node for node in graph.graph.nodes if node.target is target)


def disorder(graph: fx.GraphModule) -> None:
    relu, conv = first(graph, aten.relu.default), first(graph, aten.conv2d.default)
    conv.prepend(relu)


def second_output(graph: fx.GraphModule) -> None:
    graph.graph.output(first(graph, aten.relu.default))


def module_call(graph: fx.GraphModule) -> None:
    relu = first(graph, aten.relu.default)
    graph.add_submodule("extra", nn.ReLU())
    with graph.graph.inserting_after(relu):
        graph.graph.call_module("extra", (relu,))


def method_call(graph: fx.GraphModule) -> None:
    relu = first(graph, aten.relu.default)
    with graph.graph.inserting_after(relu):
        graph.graph.call_method("relu", (relu,))


def plain_attribute(graph: fx.GraphModule) -> None:
    bias = graph.fc.bias
    del graph.fc.bias
    graph.fc.bias = bias.detach()


def literal(graph: fx.GraphModule) -> None:
    first(graph, aten.relu.default).args = (torch.ones(1),)


def nested_literal(graph: fx.GraphModule) -> None:
    first(graph, aten.relu.default).kwargs = {"also": [torch.ones(1)]}


def valueless(graph: fx.GraphModule) -> None:
    del first(graph, aten.relu.default).meta["val"]


def valueless_input(graph: fx.GraphModule) -> None:
    (x,) = graph.graph.find_nodes(op="placeholder")
    del x.meta["val"]


def write(graph: fx.GraphModule) -> None:
    first(graph, aten.relu.default).target = aten.relu_.default


PLANTS: list[tuple[Rule, Plant, str]] = [
    (SOUND, disorder, "before it has been defined|before it was defined|'relu'"),
    (SOUND, second_output, "there is not one output, as the last node"),
    (FUNCTIONS, module_call, "node 'extra' is a call_module"),
    (FUNCTIONS, method_call, "node 'relu_1' is a call_method"),
    (REGISTERED, plain_attribute, "reads 'fc.bias', no parameter or buffer"),
    (NO_LITERALS, literal, r"'relu_' \(aten.relu.default\) has a tensor among its arguments"),
    (NO_LITERALS, nested_literal, r"'relu_' \(aten.relu.default\) has a tensor"),
    (VALUED, valueless, r"'relu_' \(aten.relu.default\) has no recorded value"),
    (VALUED, valueless_input, "'x' has no recorded value"),
    (PURE, write, r"'relu_' \(aten.relu_.default\) writes to its arguments"),
]


def breaches(rule: Rule, graph: fx.GraphModule) -> list[str]:
    return list(rule.breaches(Subject(graph)))


@pytest.mark.parametrize(
    ("rule", "plant", "words"), PLANTS, ids=[plant.__name__ for _, plant, _ in PLANTS]
)
def test_a_planted_breach_is_found(
    rule: Rule, plant: Plant, words: str, conv_graph: fx.GraphModule
) -> None:
    graph = copy_graph(conv_graph)
    assert breaches(rule, graph) == []
    plant(graph)
    (found,) = breaches(rule, graph)
    assert re.search(words, found)


def test_every_rule_has_its_breach() -> None:
    assert {rule.name for rule, _, _ in PLANTS} == {rule.name for rule in EXPORTED}


class Chooses(nn.Module):
    """Control flow, whose branches are graphs that nodes read."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda y: y + 1, lambda y: y * 2, (x,))


def test_the_branches_of_control_flow_are_legal() -> None:
    graph = trace(Chooses(), torch.ones(2, 3))
    assert [breaches(rule, graph) for rule in EXPORTED] == [[]] * len(EXPORTED)
