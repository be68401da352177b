"""What is computed in bfloat16 on CUDA: every product of floats, fused attention too."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from fxmpq.graph.layers import is_real_tensor
from fxmpq.targets.bfloat16 import in_bfloat16, in_bfloat16_for, narrow_products
from fxmpq.targets.cuda.arithmetic import dequantized

aten = torch.ops.aten


def compute_in_bfloat16(graph: fx.GraphModule) -> frozenset[str]:
    """Let float products read bfloat16, and return what they returned, in place.

    Stored operands are rounded once, here; what is computed is cast at run time, dequantized
    weights too. Norms, softmaxes and sums stay as they are.

    Args:
        graph: A rewritten graph.

    Returns:
        The places of what is computed so, as reports name them.
    """
    return frozenset(narrow_products(graph, is_real_tensor, _narrowed).values())


def _narrowed(graph: fx.GraphModule, node: fx.Node, operand: fx.Node) -> fx.Node:
    """An operand in bfloat16, if it is a float tensor."""
    if operand.op != "get_attr":
        if not _is_float(operand):
            return operand
        if operand is _mask(node):
            with graph.graph.inserting_before(node):
                return graph.graph.call_function(in_bfloat16, (operand,))
    return in_bfloat16_for(graph, node, operand)


def _mask(node: fx.Node) -> object:
    """What is added to the scores of a fused attention, `None` of any other operator."""
    if node.target is not aten.scaled_dot_product_attention.default:
        return None
    return node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")


def _is_float(operand: fx.Node) -> bool:
    """Whether a node gives a float tensor: by what the export saw, or as this rewriting made it."""
    value = operand.meta.get("val")
    return value.is_floating_point() if isinstance(value, Tensor) else operand.target is dequantized
