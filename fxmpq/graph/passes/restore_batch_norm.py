"""Give the batch norms of a functionalized program back their usual form."""

from __future__ import annotations

import operator

import torch
from torch import fx

aten = torch.ops.aten


def restore_batch_norm(graph: fx.GraphModule) -> int:
    """Replace the inference batch norm of functionalized programs, in place on the graph.

    Making a program functional turns `batch_norm(x, ...)` into the first result of
    `_native_batch_norm_legit_no_training(x, ...)`, which no other pass knows.

    Args:
        graph: A graph of ATen operators; changed in place.

    Returns:
        How many batch norms were replaced.
    """
    replaced = 0
    for node in list(graph.graph.nodes):
        if node.target is not aten._native_batch_norm_legit_no_training.default:
            continue
        results = [user for user in node.users if user.target is operator.getitem]
        if len(results) != 1 or len(node.users) != 1 or results[0].args[1] != 0:
            continue
        source, gamma, beta, mean, variance, momentum, epsilon = node.args
        with graph.graph.inserting_before(node):
            norm = graph.graph.call_function(
                aten.batch_norm.default,
                (source, gamma, beta, mean, variance, False, momentum, epsilon, False),
            )
        norm.meta = dict(results[0].meta)
        results[0].replace_all_uses_with(norm)
        graph.graph.erase_node(results[0])
        graph.graph.erase_node(node)
        replaced += 1
    if replaced:
        graph.recompile()
    return replaced
