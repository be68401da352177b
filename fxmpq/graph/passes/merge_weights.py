"""Give every weight one name and one node."""

from __future__ import annotations

from torch import Tensor, fx

from fxmpq.graph.attributes import get_tensor


def merge_weights(graph: fx.GraphModule) -> int:
    """Read every parameter and buffer through one `get_attr` node, in place on the graph.

    Tied weights (one tensor under several names, such as an input embedding and an output
    layer) are reached by the first of their names afterwards.

    Args:
        graph: A graph of ATen operators; changed in place.

    Returns:
        How many nodes were merged into another.
    """
    first: dict[int, fx.Node] = {}
    merged = 0
    for node in list(graph.graph.nodes):
        if node.op != "get_attr":
            continue
        owner, _, leaf = str(node.target).rpartition(".")
        if not isinstance(getattr(graph.get_submodule(owner), leaf), Tensor):
            continue
        kept = first.setdefault(id(get_tensor(graph, str(node.target))), node)
        if kept is not node:
            node.replace_all_uses_with(kept)
            graph.graph.erase_node(node)
            merged += 1
    if merged:
        graph.recompile()
    return merged
