"""Reading what the runtime computes inside a model: the activations that it quantizes."""

from __future__ import annotations

import copy

import torch
from torch import fx
from torch.utils import _pytree as pytree

from fxmpq.graph.rules import TargetRules

quantized_decomposed = torch.ops.quantized_decomposed


def return_activations(graph: fx.GraphModule, rules: TargetRules) -> int:
    """Let a graph also return the activations that it quantizes, in real numbers, in place.

    Each is dequantized once more for that, so the layers before and behind it are lowered as they
    are without.

    Args:
        graph: From `to_xnnpack_form`; its outputs become a flat tuple.
        rules: The target's.

    Returns:
        How many they are; they are its last outputs.
    """
    output = graph.graph.output_node()
    leaves = [leaf for leaf in pytree.tree_leaves(output.args) if isinstance(leaf, fx.Node)]
    quantize = quantized_decomposed.quantize_per_tensor.default
    shown = []
    with graph.graph.inserting_before(output):
        for node in graph.graph.find_nodes(op="call_function", target=quantize):
            if node.args[0].target in rules.through:
                continue
            dequantize = quantized_decomposed.dequantize_per_tensor.default
            shown.append(graph.graph.call_function(dequantize, (node, *node.args[1:])))
    output.args = ((*leaves, *shown),)
    codegen = copy.copy(graph.graph._codegen)
    spec = pytree.tree_structure(tuple(range(len(leaves) + len(shown))))
    described = vars(codegen)
    described["pytree_info"] = described["pytree_info"]._replace(out_spec=spec)
    graph.graph.set_codegen(codegen)
    graph.recompile()
    return len(shown)
