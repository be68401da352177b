from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import fx, nn

from fxmpq.formats import NumberFormat, Precision
from fxmpq.graph.findings import BiasUnits
from fxmpq.graph.legality import prepared
from fxmpq.graph.legality.prepared import (
    BIAS_UNITS,
    CALLS,
    FORMATS,
    GROUPS,
    INPUTS,
    LAYERS,
    OFF,
    ONE_VALUE,
    OPERATIONS,
    PLACES,
    PREPARED,
    QUANTIZERS,
)
from fxmpq.graph.legality.rule import Rule, Subject
from fxmpq.graph.prepare import insert_quantizers
from fxmpq.graph.state import GraphState, Group, copy_graph, state_of, with_state
from fxmpq.targets.onnxruntime import ONNXRUNTIME
from fxmpq.targets.reference import REFERENCE

aten = torch.ops.aten
Plant = Callable[[fx.GraphModule], None]


def call(graph: fx.GraphModule, start: str) -> fx.Node:
    """The first call of a module whose name begins so."""
    calls = graph.graph.find_nodes(op="call_module", sort=True)
    return next(node for node in calls if str(node.target).startswith(f"quantizers.{start}"))


def change_state(**fields: object) -> Plant:
    def plant(graph: fx.GraphModule) -> None:
        with_state(graph, replace(state_of(graph), **fields))

    return plant


def change_group(change: Callable[[Group], Group]) -> Plant:
    def plant(graph: fx.GraphModule) -> None:
        state = state_of(graph)
        first, *rest = state.groups
        with_state(graph, replace(state, groups=(change(first), *rest)))

    return plant


def change_layer(**fields: object) -> Plant:
    def change(group: Group) -> Group:
        first, *rest = group.layers
        return replace(group, layers=(replace(first, **fields), *rest))

    return change_group(change)


def method_call(graph: fx.GraphModule) -> None:
    node = call(graph, "weight_fc")
    with graph.graph.inserting_after(node):
        graph.graph.call_method("relu", (node,))


def unknown_module(graph: fx.GraphModule) -> None:
    graph.add_submodule("extra", nn.ReLU())
    node = call(graph, "weight_fc")
    with graph.graph.inserting_after(node):
        graph.graph.call_module("extra", (node,))


def called_twice(graph: fx.GraphModule) -> None:
    node = call(graph, "weight_fc")
    with graph.graph.inserting_after(node):
        graph.graph.call_module(str(node.target), node.args)


def never_called(graph: fx.GraphModule) -> None:
    node = call(graph, "activation_0")
    node.replace_all_uses_with(node.args[0])
    graph.graph.erase_node(node)


def two_values(graph: fx.GraphModule) -> None:
    node = call(graph, "weight_fc")
    node.args = (*node.args, 1)


def other_module(graph: fx.GraphModule) -> None:
    graph.add_submodule("quantizers.weight_fc_weight", nn.Identity())


def computed_weight(graph: fx.GraphModule) -> None:
    node = call(graph, "weight_fc")
    with graph.graph.inserting_before(node):
        node.args = (graph.graph.call_function(aten.neg.default, node.args),)


def no_such_axis(graph: fx.GraphModule) -> None:
    graph.get_submodule("quantizers.weight_fc_weight").axis = 2**70


def integer_activation(graph: fx.GraphModule) -> None:
    node = call(graph, "activation_1")
    node.args[0].meta["val"] = torch.ones(2, dtype=torch.int64)


def computed_bias(graph: fx.GraphModule) -> None:
    node = call(graph, "bias_linear")
    with graph.graph.inserting_before(node):
        node.args = (graph.graph.call_function(aten.neg.default, node.args),)


def past_the_quantizer(start: str, place: int) -> Plant:
    """Let the first layer read past a quantizer."""

    def plant(graph: fx.GraphModule) -> None:
        conv = next(node for node in graph.graph.nodes if node.target is aten.conv2d.default)
        node = call(graph, start)
        conv.update_arg(place, node.args[0])

    return plant


def lacks_a_format(graph: fx.GraphModule) -> None:
    quantizer = graph.get_submodule("quantizers.weight_fc_weight")
    quantizer.formats = quantizer.formats[1:]


def switched_on(graph: fx.GraphModule) -> None:
    graph.get_submodule("quantizers.bias_linear").activate(NumberFormat(4))


def shared_quantizer(graph: fx.GraphModule) -> None:
    state = state_of(graph)
    first, second, *rest = state.groups
    second = replace(second, activation_quantizers=first.activation_quantizers)
    with_state(graph, replace(state, groups=(first, second, *rest)))


def same_layer_in_two_groups(graph: fx.GraphModule) -> None:
    state = state_of(graph)
    first, second, *rest = state.groups
    second = replace(second, layers=(*second.layers, first.layers[0]))
    with_state(graph, replace(state, groups=(first, second, *rest)))


PLANTS: list[tuple[str, Rule, Plant, str]] = [
    ("no example", INPUTS, change_state(example=()), "1 inputs, a call of 1 and an example of 0"),
    (
        "another example",
        INPUTS,
        change_state(example=(torch.ones(2, 3, 16, 16, dtype=torch.int64),)),
        "the example of 'x' is none of its values",
    ),
    ("a method", OPERATIONS, method_call, "'relu.*' is a call_method"),
    ("an unknown module", CALLS, unknown_module, "module 'extra' is called, and in no group"),
    ("two calls", CALLS, called_twice, "weight_fc_weight' is called 2 times"),
    ("no call", CALLS, never_called, "activation_0' is in a group, and never called"),
    ("two values", ONE_VALUE, two_values, "weight_fc_weight' is not called on one value"),
    ("another module", QUANTIZERS, other_module, "weight_fc_weight' is a Identity"),
    ("a computed weight", PLACES, computed_weight, "reads no stored tensor"),
    ("no such axis", PLACES, no_such_axis, "has no axis"),
    ("an integer activation", PLACES, integer_activation, "reads no floating-point tensor"),
    ("a computed bias", PLACES, computed_bias, "reads neither a stored bias nor None"),
    ("no such node", LAYERS, change_layer(node="nothing"), "is of no conv 'nothing'"),
    ("another kind", LAYERS, change_layer(kind="linear"), "'stem.0' is of no linear 'conv2d'"),
    ("another weight", LAYERS, change_layer(weight="fc.weight"), "its weight 'fc.weight'"),
    ("another shape", LAYERS, change_layer(weight_shape=(1, 2)), r"has not the shape \(1, 2\)"),
    ("another axis", LAYERS, change_layer(channel_axis=9), "has no channel axis 9"),
    ("past the weight's", LAYERS, past_the_quantizer("weight_stem", 1), "its weight through"),
    ("past the bias's", LAYERS, past_the_quantizer("bias_conv2d", 2), "its bias through"),
    ("past the input's", LAYERS, past_the_quantizer("activation_0", 0), "its input through"),
    (
        "units of a weight",
        BIAS_UNITS,
        change_layer(bias_units=BiasUnits("quantizers.weight_fc_weight")),
        "in units of 'quantizers.weight_fc_weight', which quantizes no activation",
    ),
    (
        "units without codes",
        BIAS_UNITS,
        change_layer(bias_units=BiasUnits("quantizers.activation_0"), weight_quantizer=None),
        "'stem.0' has units of a bias, and a weight or bias that stays real",
    ),
    (
        "units of too many bits",
        BIAS_UNITS,
        change_layer(bias_units=BiasUnits("quantizers.activation_0", 1 << 40)),
        "units of a bias for codes of 1099511627776 bits",
    ),
    (
        "another name",
        GROUPS,
        change_group(lambda group: replace(group, name="nothing")),
        "group 'nothing' is not named after its first member",
    ),
    (
        "no candidates",
        GROUPS,
        change_group(lambda group: replace(group, candidates=())),
        "group 'stem.0' has no candidates",
    ),
    (
        "a candidate twice",
        GROUPS,
        change_group(lambda group: replace(group, candidates=group.candidates[:1] * 2)),
        "group 'stem.0' has no candidates, or one twice",
    ),
    ("a quantizer in two groups", GROUPS, shared_quantizer, "activation_0' is in the groups"),
    ("a layer in two groups", GROUPS, same_layer_in_two_groups, "'stem.0' is in the groups"),
    ("a missing format", FORMATS, lacks_a_format, "weight_fc_weight' lacks a format"),
    ("a quantizer that is on", OFF, switched_on, "'quantizers.bias_linear', called at .* is on"),
]


def breaches(rule: Rule, graph: fx.GraphModule) -> list[str]:
    return list(rule.breaches(Subject(graph, state_of(graph))))


@pytest.mark.parametrize(
    ("rule", "plant", "words"), [plant[1:] for plant in PLANTS], ids=[plant[0] for plant in PLANTS]
)
def test_a_planted_breach_is_found(
    rule: Rule, plant: Plant, words: str, conv_graph: fx.GraphModule
) -> None:
    graph = insert_quantizers(conv_graph, REFERENCE.rules)
    assert breaches(rule, graph) == []
    plant(graph)
    found = breaches(rule, graph)
    assert found
    assert re.search(words, found[0]), found


def test_every_rule_has_its_breach() -> None:
    rules = {rule.name for rule in vars(prepared).values() if isinstance(rule, Rule)}
    assert {rule.name for _, rule, _, _ in PLANTS} == rules


@pytest.mark.parametrize("model", ["conv", "resnet", "bert"])
@pytest.mark.parametrize("target", [REFERENCE, ONNXRUNTIME], ids=lambda target: target.name)
def test_prepared_graphs_are_legal(
    model: str, target: object, request: pytest.FixtureRequest
) -> None:
    graph = insert_quantizers(request.getfixturevalue(f"{model}_graph"), target.rules)
    excluded = insert_quantizers(
        request.getfixturevalue(f"{model}_graph"), target.rules, exclude=["*"]
    )
    for found in (graph, excluded):
        assert {rule.name: breaches(rule, found) for rule in PREPARED} == {
            rule.name: [] for rule in PREPARED
        }
    assert {group.candidates for group in state_of(excluded).groups} == {(Precision(),)}


def test_rules_change_nothing(conv_graph: fx.GraphModule) -> None:
    graph = insert_quantizers(conv_graph, REFERENCE.rules)
    before, state = str(graph.graph), state_of(graph)
    for rule in PREPARED:
        breaches(rule, graph)
    assert str(graph.graph) == before
    assert state_of(graph) is state
    assert isinstance(state, GraphState)
    assert str(copy_graph(graph).graph) == before
