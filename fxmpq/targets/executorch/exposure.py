"""Reading what the runtime computes inside a model, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx
from torch.utils import _pytree as pytree

from fxmpq.graph.call_structure import return_flat

quantized_decomposed = torch.ops.quantized_decomposed


def return_activations(graph: fx.GraphModule, quantizers: Sequence[str]) -> list[str]:
    """Let a graph also return what its layers compute, in real numbers, in place.

    What is stored in codes is dequantized once more for that, so the layers before and behind it
    are lowered as they are without. Of a layer that writes real numbers it is what it returns.

    Args:
        graph: From `to_xnnpack_form`; its outputs become a flat tuple.
        quantizers: Names of the planned graph's active quantizers, in order.

    Returns:
        For each of its further outputs, in order, the node of the planned graph that simulates it.
    """
    output = graph.graph.output_node()
    leaves = [leaf for leaf in pytree.tree_leaves(output.args) if isinstance(leaf, fx.Node)]
    shown: list[fx.Node] = []
    names: list[str] = []
    for node in list(graph.graph.nodes):
        if "quantizer" in node.meta:
            dequantize = quantized_decomposed.dequantize_per_tensor.default
            with graph.graph.inserting_before(output):
                shown.append(graph.graph.call_function(dequantize, (node, *node.args[1:])))
            names.append(quantizers[node.meta["quantizer"]])
        elif "layer" in node.meta:
            shown.append(node)
            names.append(node.meta["layer"])
    return_flat(graph, [*leaves, *shown])
    return names
