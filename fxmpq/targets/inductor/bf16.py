"""Computing what stays float in bfloat16: layers and products, where it saves time."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from fxmpq.graph.attributes import get_tensor
from fxmpq.graph.layers import place_of
from fxmpq.targets.cuda.bf16 import PRODUCTS
from fxmpq.targets.inductor.rewrite import DEQUANTIZE_WEIGHT
from fxmpq.targets.lowering import store_tensor

aten = torch.ops.aten

# Fused attention takes 1.2 times as long in bfloat16 as in float32 on a CPU without AMX.
_PRODUCTS = PRODUCTS - {aten.scaled_dot_product_attention.default}


def compute_in_bfloat16(graph: fx.GraphModule) -> dict[str, str]:
    """Let products of `float32` read `bfloat16`, and widen what they return, in place.

    Stored operands are rounded once, here; what is computed is rounded where it is made. Layers on
    codes, fused attention, norms, softmaxes and sums stay as they are.

    Args:
        graph: From `to_decomposed`.

    Returns:
        The places of the nodes that are computed so, as reports name them, by the nodes' names.
    """
    found: dict[str, str] = {}
    for node in list(graph.graph.nodes):
        if node.target not in _PRODUCTS or not _is_of_floats(node):
            continue
        found[node.name] = place_of(node)
        for operand in node.all_input_nodes:
            node.replace_input_with(operand, _narrowed(graph, node, operand))
        with graph.graph.inserting_after(node):
            widened = _cast(graph, node, torch.float32)
        widened.meta = dict(node.meta)
        node.replace_all_uses_with(widened, lambda user, widened=widened: user is not widened)
    return found


def _is_of_floats(node: fx.Node) -> bool:
    """Whether a product is one of `float32` numbers, and no layer on codes."""
    value = node.meta.get("val")
    is_on_codes = any(operand.target is DEQUANTIZE_WEIGHT for operand in node.all_input_nodes)
    return isinstance(value, Tensor) and value.dtype is torch.float32 and not is_on_codes


def _narrowed(graph: fx.GraphModule, node: fx.Node, operand: fx.Node) -> fx.Node:
    """An operand in bfloat16."""
    if operand.op == "get_attr":
        stored = get_tensor(graph, str(operand.target)).detach().bfloat16()
        return store_tensor(graph, f"bfloat16_{operand.target}", stored, node)
    with graph.graph.inserting_before(node):
        return _cast(graph, operand, torch.bfloat16)


def _cast(graph: fx.GraphModule, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    return graph.graph.call_function(aten._to_copy.default, (node,), {"dtype": dtype})
