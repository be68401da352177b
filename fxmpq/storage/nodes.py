"""Nodes: a graph's calculations as JSON and back, with the notes that later steps read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import fx
from torch._ops import OpOverload
from torch.fx.node import Argument, Target

from fxmpq.artefact import check_fields
from fxmpq.errors import FileFormatError
from fxmpq.graph.state import node_shape
from fxmpq.storage.functions import function_name, function_named
from fxmpq.storage.names import identifier, qualified
from fxmpq.storage.sizes import SizeReader, SizeWriter
from fxmpq.storage.values import Surroundings, decode_value, encode_value

_OPERATIONS = ("placeholder", "get_attr", "call_function", "call_module", "output")
_NODE = "a stored node"
_REQUIRED = frozenset({"name", "op", "target"})
_OPTIONAL = frozenset({"args", "kwargs", "shape", "value", "modules"})


def encode_nodes(graph: fx.Graph, sizes: SizeWriter) -> list[dict[str, object]]:
    """Write every node: operation, arguments, shape on the example, traced value and place.

    Args:
        graph: Of ATen operators and quantizers.
        sizes: Collects the free sizes.

    Raises:
        FileFormatError: If a node calls or holds what cannot be stored.
    """
    return [_encode_node(node, sizes) for node in graph.nodes]


def _encode_node(node: fx.Node, sizes: SizeWriter) -> dict[str, object]:
    if node.op not in _OPERATIONS:
        raise FileFormatError(f"node {node.name!r} is a {node.op}, which cannot be stored")
    try:
        called = function_name(node.target) if node.op == "call_function" else str(node.target)
        found = {
            "name": node.name,
            "op": node.op,
            "target": called,
            "args": [encode_value(argument) for argument in node.args],
            "kwargs": {name: encode_value(value) for name, value in node.kwargs.items()},
            "shape": list(shape) if (shape := node_shape(node)) is not None else None,
            "value": sizes.write(node.meta.get("val")),
            "modules": _places(node),
        }
    except FileFormatError as error:
        raise FileFormatError(f"node {node.name!r}: {error}") from error
    kept = {name: value for name, value in found.items() if value not in (None, {})}
    return {name: value for name, value in kept.items() if value != [] or name == "shape"}


def _places(node: fx.Node) -> list[list[object]]:
    """The modules that a node comes from, outermost first: key, path and class."""
    stack = node.meta.get("nn_module_stack") or {}
    return [
        [str(key), str(entry[0]), _class_name(entry[1])]
        for key, entry in stack.items()
        if isinstance(entry, tuple) and len(entry) == 2
    ]


def _class_name(kind: object) -> str:
    return f"{kind.__module__}.{kind.__qualname__}" if isinstance(kind, type) else str(kind)


def decode_nodes(found: object, sizes: SizeReader, device: torch.device) -> fx.Graph:
    """Read a graph back; every name that its code will hold is checked.

    Args:
        found: As `encode_nodes` gives it.
        sizes: Knows the free sizes.
        device: That operators make tensors on.

    Raises:
        FileFormatError: If a node cannot be made, or reads a later one.
    """
    if not isinstance(found, list):
        raise FileFormatError(f"nodes are a list; found {str(found)[:80]!r}")
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    for entry in found:
        if not isinstance(entry, dict):
            raise FileFormatError(f"{_NODE} is an object; found {str(entry)[:80]!r}")
        check_fields(_NODE, entry, set(_REQUIRED), set(_OPTIONAL))
        node = _decode_node(graph, entry, Surroundings(nodes, device))
        node.meta.update(_decode_notes(entry, sizes))
        nodes[node.name] = node
    _check_order(graph)
    return graph


def _decode_node(graph: fx.Graph, entry: Mapping[str, object], around: Surroundings) -> fx.Node:
    name, operation = identifier(entry["name"], "a node"), entry["op"]
    if operation not in _OPERATIONS:
        raise FileFormatError(f"node {name!r} is a {operation!r}; known are {_OPERATIONS}")
    args, kwargs = entry.get("args", []), entry.get("kwargs", {})
    if not isinstance(args, list) or not isinstance(kwargs, dict):
        raise FileFormatError(f"node {name!r} has no arguments: {args!r}, {kwargs!r}")
    target: Target
    if operation == "call_function":
        target = function_named(entry["target"])
    elif operation in ("get_attr", "call_module"):
        target = qualified(entry["target"], f"the target of {name!r}")
    else:
        target = identifier(entry["target"], f"the target of {name!r}")
    if operation in ("placeholder", "get_attr") and (args or kwargs):
        raise FileFormatError(f"node {name!r} is a {operation} and takes no arguments")
    positional = tuple(decode_value(argument, around) for argument in args)
    named = {
        identifier(key, f"an argument of {name!r}"): decode_value(value, around)
        for key, value in kwargs.items()
    }
    if isinstance(target, OpOverload):
        _check_arguments(name, target, len(args), kwargs)
    node = graph.create_node(
        str(operation),
        target,
        cast("tuple[Argument, ...]", positional),
        cast("dict[str, Argument]", named),
        name=name,
    )
    if node.name != name:
        raise FileFormatError(f"two nodes are named {name!r}, or it is Python's own name")
    return node


def _check_arguments(
    name: str, operator: OpOverload, positional: int, kwargs: Mapping[str, object]
) -> None:
    """An operator has all arguments that it needs, and none that it does not take."""
    arguments = operator._schema.arguments
    required = [found.name for found in arguments[positional:] if not found.has_default_value()]
    unknown = set(kwargs) - {found.name for found in arguments[positional:]}
    if positional > len(arguments) or unknown or set(required) - set(kwargs):
        raise FileFormatError(
            f"node {name!r} does not call {operator} as it is: {operator._schema}"
        )


def _decode_notes(entry: Mapping[str, object], sizes: SizeReader) -> dict[str, object]:
    notes: dict[str, object] = {}
    if "value" in entry:
        notes["val"] = sizes.read(entry["value"])
    if "shape" in entry:
        notes["example_shape"] = decode_value({"size": entry["shape"]}, Surroundings())
    places = entry.get("modules", [])
    if not isinstance(places, list) or not all(_is_place(place) for place in places):
        raise FileFormatError(f"a place is key, path and class; found {str(places)[:80]!r}")
    if places:
        notes["nn_module_stack"] = {key: (path, kind) for key, path, kind in places}
    return notes


def _is_place(found: object) -> bool:
    return (
        isinstance(found, list) and len(found) == 3 and all(isinstance(part, str) for part in found)
    )


def _check_order(graph: fx.Graph) -> None:
    """Arguments stand in front and one output at the end."""
    operations = [node.op for node in graph.nodes]
    if operations.count("output") != 1 or operations[-1] != "output":
        raise FileFormatError("a graph has one output, its last node")
    output = next(iter(graph.find_nodes(op="output")))
    if output.target != "output" or len(output.args) != 1:
        raise FileFormatError("a graph's output has one argument")
