"""Tensors of a graph by their qualified names."""

from __future__ import annotations

from torch import Tensor, fx, nn


def get_tensor(graph: fx.GraphModule, name: str) -> Tensor:
    """The parameter, buffer or constant that a `get_attr` node of this target reads.

    Raises:
        AttributeError: If there is none.
    """
    owner_name, _, leaf = name.rpartition(".")
    value = getattr(graph.get_submodule(owner_name), leaf)
    if not isinstance(value, Tensor):
        raise AttributeError(f"{name!r} is a {type(value).__name__}, not a tensor")
    return value


def set_tensor(graph: fx.GraphModule, name: str, value: Tensor) -> None:
    """Store a tensor under a qualified name, making the modules on the way.

    Args:
        graph: Changed in place.
        name: As `encoder.layer.0.weight`.
        value: A parameter is registered as such, any other tensor as a buffer.
    """
    owner: nn.Module = graph
    *path, leaf = name.split(".")
    for part in path:
        child = getattr(owner, part, None)
        if not isinstance(child, nn.Module):
            child = nn.Module()
            owner.add_module(part, child)
        owner = child
    if hasattr(owner, leaf):
        delattr(owner, leaf)
    if isinstance(value, nn.Parameter):
        owner.register_parameter(leaf, value)
    else:
        owner.register_buffer(leaf, value)


def replace_stored(graph: fx.GraphModule, node: fx.Node, value: Tensor) -> None:
    """Store a transformed tensor in place of the one that a node reads.

    A parameter stays one, with or without gradients as it was, and the value that the export
    recorded for the node gets the new shape and memory layout.

    Args:
        graph: Changed in place.
        node: A `get_attr` node.
        value: What it is to read.
    """
    name = str(node.target)
    stored = get_tensor(graph, name)
    if isinstance(stored, nn.Parameter):
        value = nn.Parameter(value, stored.requires_grad)
    set_tensor(graph, name, value)
    recorded = node.meta.get("val")
    if isinstance(recorded, Tensor):
        node.meta["val"] = recorded.new_empty_strided(value.shape, value.stride())
