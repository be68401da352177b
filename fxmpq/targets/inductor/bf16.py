"""What is computed in bfloat16 on a CPU: layers and products of floats, where it saves time."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from fxmpq.targets.bfloat16 import in_bfloat16_for, narrow_products
from fxmpq.targets.inductor.rewrite import DEQUANTIZE_WEIGHT

aten = torch.ops.aten


def compute_in_bfloat16(graph: fx.GraphModule) -> dict[str, str]:
    """Let products of `float32` read `bfloat16`, and widen what they return, in place.

    Stored operands are rounded once, here; what is computed is rounded where it is made. Layers on
    codes, fused attention, norms, softmaxes and sums stay as they are.

    Args:
        graph: From `to_decomposed`.

    Returns:
        The places of the nodes that are computed so, as reports name them, by the nodes' names.
    """
    return narrow_products(graph, _saves_time, in_bfloat16_for)


def _saves_time(node: fx.Node) -> bool:
    """Whether a product is one of `float32` numbers, and no layer on codes."""
    # Fused attention takes 1.2 times as long in bfloat16 as in float32 on a CPU without AMX.
    if node.target is aten.scaled_dot_product_attention.default:
        return False
    value = node.meta.get("val")
    is_on_codes = any(operand.target is DEQUANTIZE_WEIGHT for operand in node.all_input_nodes)
    return isinstance(value, Tensor) and value.dtype is torch.float32 and not is_on_codes
