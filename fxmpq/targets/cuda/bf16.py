"""Computing what stays float in bfloat16: products and convolutions, where it saves time."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, fx

from fxmpq.graph.attributes import get_tensor
from fxmpq.graph.layers import is_real_tensor, place_of
from fxmpq.targets.cuda.arithmetic import dequantized, in_bfloat16
from fxmpq.targets.lowering import store_tensor

aten = torch.ops.aten
own = torch.ops.fxmpq

PRODUCTS: frozenset[object] = frozenset(
    {
        aten.linear.default,
        own.linear.default,
        aten.conv1d.default,
        aten.conv1d.padding,
        aten.conv2d.default,
        aten.conv2d.padding,
        aten.conv3d.default,
        aten.conv3d.padding,
        aten.conv_transpose1d.default,
        aten.conv_transpose2d.input,
        aten.conv_transpose3d.input,
        aten.matmul.default,
        aten.mm.default,
        aten.bmm.default,
        aten.addmm.default,
        aten.baddbmm.default,
        aten.scaled_dot_product_attention.default,
    }
)
"""Operators that are computed in bfloat16; norms, softmaxes and sums stay as they are."""


def compute_in_bfloat16(graph: fx.GraphModule) -> frozenset[str]:
    """Let float products read bfloat16, and return what they returned, in place.

    Stored operands are rounded once, here; what is computed is cast at run time, dequantized
    weights too.

    Args:
        graph: A rewritten graph.

    Returns:
        The places of what is computed so, as reports name them.
    """
    places: set[str] = set()
    for node in list(graph.graph.nodes):
        if node.target not in PRODUCTS or not is_real_tensor(node):
            continue
        places.add(place_of(node))
        narrow = partial(_narrowed, graph, node)
        node.args = fx.node.map_arg(node.args, narrow)
        node.kwargs = fx.node.map_arg(node.kwargs, narrow)
        with graph.graph.inserting_after(node):
            widened = graph.graph.call_function(
                aten._to_copy.default, (node,), {"dtype": node.meta["val"].dtype}
            )
        widened.meta = dict(node.meta)
        node.replace_all_uses_with(widened, lambda user, widened=widened: user is not widened)
    return frozenset(places)


def _narrowed(graph: fx.GraphModule, node: fx.Node, operand: fx.Node) -> fx.Node:
    """An operand in bfloat16, if it is a float tensor."""
    if operand.op == "get_attr":
        stored = get_tensor(graph, str(operand.target))
        if not stored.is_floating_point():
            return operand
        name = f"bfloat16_{operand.target}"
        return store_tensor(graph, name, in_bfloat16(stored.detach()), node)
    if not _is_float(operand):
        return operand
    call = graph.graph.call_function
    with graph.graph.inserting_before(node):
        if operand is _mask(node):
            return call(in_bfloat16, (operand,))
        return call(aten._to_copy.default, (operand,), {"dtype": torch.bfloat16})


def _mask(node: fx.Node) -> object:
    """What is added to the scores of a fused attention, `None` of any other operator."""
    if node.target is not aten.scaled_dot_product_attention.default:
        return None
    return node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")


def _is_float(operand: fx.Node) -> bool:
    """Whether a node gives a float tensor: by what the export saw, or as this rewriting made it."""
    value = operand.meta.get("val")
    return value.is_floating_point() if isinstance(value, Tensor) else operand.target is dequantized
