"""What holds of every graph, from the first pass on."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from fxmpq.graph.legality.rule import Breaches, Rule, Subject, called

_FUNCTIONS_ONLY = frozenset({"placeholder", "get_attr", "call_function", "output"})


def _sound(subject: Subject) -> Breaches:
    try:
        subject.graph.graph.lint()
    except (RuntimeError, ValueError, AttributeError, TypeError) as error:
        yield str(error).splitlines()[0]
        return
    operations = [node.op for node in subject.nodes.values()]
    if operations.count("output") != 1 or operations[-1] != "output":
        yield "there is not one output, as the last node"


def _functions(subject: Subject) -> Breaches:
    for node in subject.nodes.values():
        if node.op not in _FUNCTIONS_ONLY:
            yield f"node {node.name!r} is a {node.op}"


def _registered(subject: Subject) -> Breaches:
    for node in subject.graph.graph.find_nodes(op="get_attr"):
        is_graph = isinstance(subject.modules.get(str(node.target)), nn.Module)
        if not is_graph and subject.stored(node) is None:
            yield f"node {node.name!r} reads {node.target!r}, no parameter or buffer"


def _no_literals(subject: Subject) -> Breaches:
    for node in subject.nodes.values():
        held: list[Tensor] = []

        def look(argument: fx.node.Argument, held: list[Tensor] = held) -> fx.node.Argument:
            if isinstance(argument, Tensor):
                held.append(argument)
            return argument

        fx.node.map_aggregate((node.args, node.kwargs), look)
        if held:
            yield f"node {called(node)} has a tensor among its arguments"


def _valued(subject: Subject) -> Breaches:
    for node in subject.nodes.values():
        target = node.target
        returns = isinstance(target, torch._ops.OpOverload) and bool(target._schema.returns)
        if (node.op == "placeholder" or returns) and "val" not in node.meta:
            yield f"node {called(node)} has no recorded value"


def _pure(subject: Subject) -> Breaches:
    for node in subject.nodes.values():
        target = node.target
        if isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable:
            yield f"node {called(node)} writes to its arguments"


SOUND = Rule(
    "sound",
    "every argument stands before its reader, one output last, and names are unique",
    _sound,
    needed=True,
)
FUNCTIONS = Rule(
    "functions only", "nodes read stored tensors or call functions", _functions, needed=True
)
REGISTERED = Rule(
    "registered tensors",
    "stored tensors are parameters or buffers, which move with the graph and are saved with it",
    _registered,
)
NO_LITERALS = Rule("no literals", "no tensor stands among a node's arguments", _no_literals)
VALUED = Rule("recorded values", "inputs and operators know their value's dtype and sizes", _valued)
PURE = Rule("pure", "no operator writes to its arguments", _pure, needed=True)

# A prepared graph calls modules; all else holds of it too.
EVERYWHERE = (SOUND, REGISTERED, NO_LITERALS, VALUED, PURE)
EXPORTED = (SOUND, FUNCTIONS, *EVERYWHERE[1:])
