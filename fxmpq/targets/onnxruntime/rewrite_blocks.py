"""Rewriting layers of which only the weights are quantized."""

from __future__ import annotations

import torch
from torch import fx

from fxmpq.graph.attributes import get_tensor
from fxmpq.graph.operators import OPERATORS, argument
from fxmpq.quantizers.modules import WeightQuantizer
from fxmpq.targets.lowering import store_tensor
from fxmpq.targets.onnxruntime import operators  # noqa: F401  (registers torch.ops.fxmpq)
from fxmpq.targets.onnxruntime.blocks import kernel_block, pack_rows


def rewrite_in_blocks(graph: fx.GraphModule, node: fx.Node, quantizer: WeightQuantizer) -> None:
    """Replace a linear layer by `block_linear`, an embedding by `block_embedding`, in place.

    The weight is stored packed in `packed_<bits>bit_<weight>`, with its scales in
    `scale_<weight>`, shape `[rows, scales]`: once, however many calls read it.

    Args:
        graph: Lowered; changed.
        node: The layer's call.
        quantizer: Of its weight, with an active format.
    """
    found = quantizer.active
    assert found is not None
    weight = get_tensor(graph, quantizer.name).detach()
    rows, width = weight.shape
    block = kernel_block(width, found)
    packed = pack_rows(quantizer.codes(weight, found), found.bits, block)
    scale = quantizer.scale(found).reshape(rows, -1)
    name = quantizer.name
    stored = (
        store_tensor(graph, f"packed_{found.bits}bit_{name}", packed, node),
        store_tensor(graph, f"scale_{name}", scale, node),
    )
    operator = OPERATORS[node.target]
    layout = (found.bits, block, width)
    with graph.graph.inserting_before(node):
        if operator.kind == "embedding":
            call = graph.graph.call_function(
                torch.ops.fxmpq.block_embedding.default, (node.args[1], *stored, *layout)
            )
        else:
            bias = argument(node, operator.bias)
            assert bias is None or isinstance(bias, fx.Node)
            call = graph.graph.call_function(
                torch.ops.fxmpq.block_linear.default, (node.args[0], *stored, bias, *layout, rows)
            )
    node.replace_all_uses_with(call)
    graph.graph.erase_node(node)
