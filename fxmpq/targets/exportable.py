"""What the ONNX exporter refuses, written as it takes it."""

from __future__ import annotations

import torch
from torch import fx
from torch.utils import _pytree as pytree

from fxmpq.graph.call_structure import return_flat

aten = torch.ops.aten


def make_exportable(graph: fx.GraphModule) -> int:
    """Replace what torch's ONNX exporter stops at by equal operators, in place on the graph.

    `rsub(x, c, alpha)` with a number c becomes `(-alpha x) + c`: the exporter (torch 2.13) looks
    for an overload of `sub` whose first operand is a number when it promotes types, and there is
    none. The bits are the same where alpha is 1, since negation is exact; else `alpha x` is rounded
    by itself.

    Args:
        graph: A lowered graph; changed in place.

    Returns:
        How many operators were replaced.
    """
    replaced = 0
    for node in list(graph.graph.nodes):
        if node.target is not aten.rsub.Scalar:
            continue
        x, number, *rest = node.args
        alpha = rest[0] if rest else node.kwargs.get("alpha", 1)
        with graph.graph.inserting_before(node):
            scaled = x
            if alpha != 1:
                scaled = graph.graph.call_function(aten.mul.Tensor, (x, alpha))
            negated = graph.graph.call_function(aten.neg.default, (scaled,))
            total = graph.graph.call_function(aten.add.Tensor, (negated, number))
        total.meta = dict(node.meta)
        node.replace_all_uses_with(total)
        graph.graph.erase_node(node)
        replaced += 1
    if replaced:
        graph.recompile()
    return replaced


def return_tensors_alone(graph: fx.GraphModule) -> None:
    """Let a graph return the tensors that it computes, and no `None`, number or size, in place.

    Args:
        graph: A lowered graph. Where it returns something else too, it then returns a tuple of
            the tensors.
    """
    output = graph.graph.output_node()
    leaves = pytree.tree_leaves(output.args)
    kept = tuple(leaf for leaf in leaves if isinstance(leaf, fx.Node) and not _is_number(leaf))
    if len(kept) < len(leaves):
        return_flat(graph, kept)


def _is_number(node: fx.Node) -> bool:
    """Whether a node computes a number of Python's, as a free size."""
    value = node.meta.get("val")
    return isinstance(value, (bool, int, float, torch.SymBool, torch.SymInt, torch.SymFloat))
