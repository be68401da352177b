"""Compute once what weights are computed from."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch import Tensor, fx, nn

from fxmpq.graph.attributes import get_tensor, set_tensor
from fxmpq.graph.constants import constant_nodes
from fxmpq.graph.operators import argument, operator_of

aten = torch.ops.aten


def fold_constants(graph: fx.GraphModule) -> int:
    """Store every weight and bias that is computed from stored tensors alone, in place.

    Weight normalization, standardized convolutions and slices of a joint projection compute
    their weights in each forward pass; here it is done once, by the same operators, so the
    graph gives the same bits. A weight that is computed anew for each call of its module is
    stored once. A stored result is named after the layer that reads it, as
    `encoder.conv.weight`, with a number behind it where that name is taken, and is trainable
    where anything it was computed from is.

    Args:
        graph: A graph of ATen operators; changed in place.

    Returns:
        How many weights and biases were stored.
    """
    constants = constant_nodes(graph)
    folded: dict[fx.Node, fx.Node] = {}
    wanted: dict[fx.Node, str] = {}
    values: dict[fx.Node, fx.node.Argument] = {}
    for node in list(graph.graph.nodes):
        for leaf, found in _computed_operands(node, constants):
            source = constants[found]
            value = _value(graph, source, values)
            if not isinstance(value, Tensor):
                continue
            if source not in folded:
                is_trainable = value.is_floating_point() and _is_trainable(graph, source)
                parameter = nn.Parameter(_own(value), is_trainable)
                folded[source] = _store(graph, node, f"folded_{len(folded)}", parameter)
                wanted[folded[source]] = f"{_module_path(node)}.{leaf}".lstrip(".")
            node.replace_input_with(found, folded[source])
    before = _read_names(graph)
    graph.graph.eliminate_dead_code()
    for name in before - _read_names(graph):
        _remove(graph, name)
    for stored, name in wanted.items():
        _rename(graph, stored, name)
    graph.recompile()
    return len(folded)


def _computed_operands(
    node: fx.Node, constants: Collection[fx.Node]
) -> Iterator[tuple[str, fx.Node]]:
    """A layer's weight and bias, where they are computed from constants."""
    operator = operator_of(node)
    if operator is None:
        return
    for leaf, position in (("weight", operator.weight), ("bias", operator.bias)):
        source = argument(node, position)
        if isinstance(source, fx.Node) and source in constants and source.op != "get_attr":
            yield leaf, source


def _value(
    graph: fx.GraphModule, node: fx.Node, values: dict[fx.Node, fx.node.Argument]
) -> fx.node.Argument:
    """Compute a constant, and what it is computed from, once."""
    for source in sorted(_sources(node) - values.keys()):
        if source.op == "get_attr":
            values[source] = get_tensor(graph, str(source.target)).detach()
        else:
            args = fx.node.map_arg(source.args, values.__getitem__)
            kwargs = fx.node.map_arg(source.kwargs, values.__getitem__)
            assert callable(source.target)
            values[source] = source.target(*args, **kwargs)
    return values[node]


def _sources(node: fx.Node) -> set[fx.Node]:
    """A node and all that it is computed from."""
    found, waiting = {node}, [node]
    while waiting:
        more = set(waiting.pop().all_input_nodes) - found
        found |= more
        waiting += more
    return found


def _is_trainable(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Whether anything that a constant is computed from is trained."""
    stored = (source for source in _sources(node) if source.op == "get_attr")
    return any(get_tensor(graph, str(source.target)).requires_grad for source in stored)


def _own(value: Tensor) -> Tensor:
    """A copy without the tensor that it may be a slice of; dense strides, and so kernels, stay."""
    return value.detach().clone(memory_format=torch.preserve_format)


def _store(graph: fx.GraphModule, reader: fx.Node, name: str, value: nn.Parameter) -> fx.Node:
    set_tensor(graph, name, value)
    with graph.graph.inserting_before(reader):
        return graph.graph.get_attr(name)


def _module_path(node: fx.Node) -> str:
    """The innermost module that a node comes from."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [entry[0] for entry in stack.values() if isinstance(entry, tuple)]
    return str(paths[-1]) if paths else ""


def _read_names(graph: fx.GraphModule) -> set[str]:
    return {str(node.target) for node in graph.graph.nodes if node.op == "get_attr"}


def _remove(graph: fx.GraphModule, name: str) -> None:
    owner, _, leaf = name.rpartition(".")
    delattr(graph.get_submodule(owner), leaf)


def _rename(graph: fx.GraphModule, node: fx.Node, wanted: str) -> None:
    """Give a stored tensor its name, or that with the first number that is free."""
    value = get_tensor(graph, str(node.target))
    name, count = wanted, 1
    while _is_taken(graph, name):
        count += 1
        name = f"{wanted}_{count}"
    _remove(graph, str(node.target))
    set_tensor(graph, name, value)
    node.target = name


def _is_taken(graph: fx.GraphModule, name: str) -> bool:
    owner: object = graph
    for part in name.split("."):
        if not hasattr(owner, part):
            return False
        owner = getattr(owner, part)
    # A module that parametrized its weight still answers to the weight's name.
    return True
