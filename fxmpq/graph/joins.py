"""Joins: the rules by which layers must share a precision."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from fxmpq.graph.findings import Join, Missed
from fxmpq.graph.layers import place_of
from fxmpq.graph.operators import OPERATORS, argument
from fxmpq.graph.state import Layer
from fxmpq.graph.vocabulary import (
    ACTIVATIONS,
    MEETINGS,
    MOVEMENTS,
    POOLINGS,
    met_tensors,
    operator_name,
)

_PASSED = MOVEMENTS | POOLINGS | ACTIVATIONS


@dataclass(frozen=True)
class FoundJoins:
    """What a rule found.

    Args:
        joins: Pairs of layers; whoever is joined to the same layer is joined too.
        missed: Where it did not fire, and why.
    """

    joins: tuple[Join, ...] = ()
    missed: tuple[Missed, ...] = ()


FindJoins = Callable[[fx.GraphModule, Sequence[Layer]], FoundJoins]


@dataclass(frozen=True)
class JoinRule:
    """A rule by which layers must share a precision.

    Args:
        find: Finds the pairs among the layers it is given; a pure function.
        says: What a layer has to do with the other, for people.
        of_activations: Whether it is about an activation stored in codes, and so joins nothing
            where every candidate is weight-only.
    """

    find: FindJoins
    says: str
    of_activations: bool = False


def shared_weight(graph: fx.GraphModule, layers: Sequence[Layer]) -> FoundJoins:
    """Join layers that have one weight: tied weights, a module that is called twice.

    Args:
        graph: A canonical graph.
        layers: In graph order.
    """
    return FoundJoins(tuple(_same("shared_weight", layers, [(x.weight,) for x in layers])))


def shared_input(graph: fx.GraphModule, layers: Sequence[Layer]) -> FoundJoins:
    """Join layers that read one activation: query, key and value; a downsample and its block.

    Args:
        graph: A canonical graph.
        layers: In graph order.
    """
    nodes = {node.name: node for node in graph.graph.nodes}
    keys: list[tuple[object, ...]] = []
    for layer in layers:
        operator = OPERATORS[nodes[layer.node].target]
        source = argument(nodes[layer.node], operator.input)
        keys.append((source,) if operator.quantizes_input else ())
    return FoundJoins(tuple(_same("shared_input", layers, keys)))


def added(graph: fx.GraphModule, layers: Sequence[Layer]) -> FoundJoins:
    """Join layers whose outputs meet in an add, as a residual block's last ones do.

    An output is followed through activations, pooling and what moves values about, and through
    earlier sums and concatenations: along a chain of residual blocks all are joined. Where an
    operand is not computed by a layer in this way, the rule says by what.

    Args:
        graph: A canonical graph.
        layers: In graph order; others do not count as layers.
    """
    return _meeting("added", "add", graph, layers)


def concatenated(graph: fx.GraphModule, layers: Sequence[Layer]) -> FoundJoins:
    """Join layers whose outputs are concatenated; they are followed as by `added`.

    Args:
        graph: A canonical graph.
        layers: In graph order; others do not count as layers.
    """
    return _meeting("concatenated", "cat", graph, layers)


JOINS: Mapping[str, JoinRule] = {
    "shared_weight": JoinRule(shared_weight, "has the weight of {other}"),
    "shared_input": JoinRule(shared_input, "reads the input of {other}", of_activations=True),
    "added": JoinRule(added, "is added to {other}"),
    "concatenated": JoinRule(concatenated, "is concatenated with {other}"),
}


def describe_join(join: Join, other: str | None = None) -> str:
    """Say what a layer has to do with the one that it is joined to.

    Args:
        join: By a key of `JOINS`, `tied` or `shared_range`.
        other: What to call the earlier layer, if not by its name.

    Examples:
        >>> describe_join(Join("shared_input", "key", "query"))
        'reads the input of query'
    """
    says = JOINS[join.rule].says if join.rule in JOINS else _SAYS[join.rule]
    return says.format(other=other or join.other)


_SAYS = {
    "tied": "is tied to {other}",
    "shared_range": "has a range in common with {other}",
}


def _same(rule: str, layers: Sequence[Layer], keys: Sequence[tuple[object, ...]]) -> Iterator[Join]:
    """Join each layer to the first of the same key; an empty key joins nothing."""
    first: dict[tuple[object, ...], str] = {}
    for layer, key in zip(layers, keys, strict=True):
        other = first.setdefault(key, layer.name) if key else layer.name
        if other != layer.name:
            yield Join(rule, layer.name, other)


def _meeting(
    rule: str, operator: str, graph: fx.GraphModule, layers: Sequence[Layer]
) -> FoundJoins:
    names = {layer.node: layer.name for layer in layers}
    order = {layer.name: position for position, layer in enumerate(layers)}
    sources = _Sources(names)
    joins: dict[Join, None] = {}
    missed: list[Missed] = []
    for node in graph.graph.nodes:
        if operator_name(node) not in MEETINGS:
            continue
        found = [sources.behind(tensor) for tensor in met_tensors(node)]
        members = sorted({name for one in found for name in one.layers}, key=order.__getitem__)
        if operator_name(node) != operator:
            sources.settle(node, members)
            continue
        joins.update(dict.fromkeys(Join(rule, member, members[0]) for member in members[1:]))
        strangers = dict.fromkeys(one.stranger for one in found if one.stranger)
        if members and strangers:
            met = "the other operand of its add" if operator == "add" else "what it meets"
            missed.append(Missed(rule, members[-1], f"{met} {' and '.join(strangers)}"))
        # All members are one group now, so one of them stands for all.
        sources.settle(node, members[:1])
    return FoundJoins(tuple(joins), tuple(missed))


@dataclass(frozen=True)
class _Source:
    """Names of the layers that compute a tensor; where there is none, what it is instead."""

    layers: tuple[str, ...] = ()
    stranger: str = ""


class _Sources:
    """Finds what computes a tensor; each node is looked at once.

    Args:
        layers: Name per node of a layer.
    """

    def __init__(self, layers: Mapping[str, str]) -> None:
        self._layers = layers
        self._known: dict[fx.Node, _Source] = {}

    def settle(self, node: fx.Node, layers: Sequence[str]) -> None:
        """Let these layers stand for all that meet in a node; it is a stranger without any."""
        self._known[node] = _Source(tuple(layers), "" if layers else _stranger(node))

    def behind(self, node: fx.Node) -> _Source:
        """The layers behind a tensor, or what else it is."""
        passed = [node]
        while passed[-1] not in self._known and _is_passed(passed[-1]):
            source = passed[-1].args[0]
            assert isinstance(source, fx.Node)
            passed.append(source)
        last = passed[-1]
        if last not in self._known:
            name = self._layers.get(last.name)
            self._known[last] = _Source((name,)) if name else _Source((), _stranger(last))
        self._known.update(dict.fromkeys(passed, self._known[last]))
        return self._known[last]


def _is_passed(node: fx.Node) -> bool:
    name = operator_name(node)
    return (name in _PASSED or name == "getitem") and isinstance(node.args[0], fx.Node)


def _stranger(node: fx.Node) -> str:
    """How people call a tensor that no layer computes."""
    if node.op == "placeholder":
        return f"is the model's input {node.target!r}"
    if node.op == "get_attr":
        return f"is the stored {node.target!r}"
    return f"is computed by {operator_name(node)} ({place_of(node)}), not by a quantized layer"
