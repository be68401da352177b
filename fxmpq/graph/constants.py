"""Constants: what a graph computes from stored tensors alone."""

from __future__ import annotations

import torch
from torch import Tensor, fx


def constant_nodes(graph: fx.GraphModule) -> dict[fx.Node, fx.Node]:
    """Find the nodes whose value is the same in every call.

    These are stored tensors, and functions of them without chance.

    Args:
        graph: A graph of ATen operators.

    Returns:
        Each such node, in graph order, with the first one that computes the same.
    """
    found: dict[fx.Node, fx.Node] = {}
    first: dict[tuple[object, str], fx.Node] = {}
    for node in graph.graph.nodes:
        if node.op == "get_attr" and _holds_tensor(graph, str(node.target)):
            found[node] = node
        elif node.op == "call_function" and node.all_input_nodes:
            tags = getattr(node.target, "tags", ())
            is_random = torch.Tag.nondeterministic_seeded in tags
            if not is_random and all(source in found for source in node.all_input_nodes):
                arguments = fx.node.map_arg((node.args, node.kwargs), found.__getitem__)
                found[node] = first.setdefault((node.target, repr(arguments)), node)
    return found


def _holds_tensor(graph: fx.GraphModule, name: str) -> bool:
    """Whether a stored attribute is a tensor; the branches of control flow are graphs."""
    owner, _, leaf = name.rpartition(".")
    return isinstance(getattr(graph.get_submodule(owner), leaf), Tensor)
