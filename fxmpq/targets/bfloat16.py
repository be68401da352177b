"""Computing what stays float in bfloat16: products and convolutions, where it saves time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx

from fxmpq.graph.attributes import get_tensor
from fxmpq.graph.layers import place_of
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


def narrow_products(
    graph: fx.GraphModule,
    is_narrowed: Callable[[fx.Node], bool],
    narrowed: Callable[[fx.GraphModule, fx.Node, fx.Node], fx.Node],
) -> dict[str, str]:
    """Let float products read bfloat16, and return what they returned, in place.

    Args:
        graph: A rewritten graph.
        is_narrowed: Whether one of `PRODUCTS` is computed so.
        narrowed: Gives an operand in bfloat16, as `in_bfloat16_for` does.

    Returns:
        The places of the nodes that are computed so, as reports name them, by the nodes' names.
    """
    found: dict[str, str] = {}
    for node in list(graph.graph.nodes):
        if node.target not in PRODUCTS or not is_narrowed(node):
            continue
        found[node.name] = place_of(node)
        for operand in node.all_input_nodes:
            node.replace_input_with(operand, narrowed(graph, node, operand))
        with graph.graph.inserting_after(node):
            widened = _cast(graph, node, node.meta["val"].dtype)
        widened.meta = dict(node.meta)
        node.replace_all_uses_with(widened, lambda user, widened=widened: user is not widened)
    return found


def in_bfloat16_for(graph: fx.GraphModule, node: fx.Node, operand: fx.Node) -> fx.Node:
    """An operand in bfloat16: a stored one is rounded once, here, a computed one where it is made.

    Args:
        graph: Changed in place.
        node: What reads the operand.
        operand: Floats; a stored tensor of other numbers is returned as it is.
    """
    if operand.op != "get_attr":
        with graph.graph.inserting_before(node):
            return _cast(graph, operand, torch.bfloat16)
    stored = get_tensor(graph, str(operand.target)).detach()
    if not stored.is_floating_point():
        return operand
    return store_tensor(graph, f"bfloat16_{operand.target}", in_bfloat16(stored), node)


def in_bfloat16(x: Tensor) -> Tensor:
    """Round to bfloat16, and never a finite number to infinity.

    Masks hold the least number of `float32`, which bfloat16 does not reach; where it became
    infinite, a row that is masked as a whole would be NaN behind the softmax.

    Examples:
        >>> in_bfloat16(torch.tensor([-torch.inf, torch.finfo(torch.float32).min])).isinf()
        tensor([ True, False])
    """
    limits = torch.finfo(torch.bfloat16)
    return torch.where(x.isinf(), x, x.clamp(limits.min, limits.max)).to(torch.bfloat16)


def _cast(graph: fx.GraphModule, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    return graph.graph.call_function(aten._to_copy.default, (node,), {"dtype": dtype})
