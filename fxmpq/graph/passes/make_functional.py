"""Replace in-place operators by their pure forms."""

from __future__ import annotations

import torch
from torch import fx


def make_functional(graph: fx.GraphModule) -> int:
    """Replace every in-place ATen operator whose pure form exists, in place on the graph.

    `add_(x, y)` becomes `add(x, y)`; every later reader of `x` then reads the new value,
    as it did before. Other views of `x` must not be read later: `trace` has such programs
    made functional by `torch.export` first.

    Args:
        graph: A graph of ATen operators; changed in place.

    Returns:
        How many nodes were replaced.
    """
    replaced = 0
    order = {node: position for position, node in enumerate(graph.graph.nodes)}
    for node in list(graph.graph.nodes):
        pure = _pure_form(node)
        if pure is None:
            continue
        mutated = node.args[0]
        node.target = pure
        for reader in list(mutated.users):
            if order[reader] > order[node]:
                reader.replace_input_with(mutated, node)
        replaced += 1
    if replaced:
        graph.recompile()
    return replaced


def _pure_form(node: fx.Node) -> torch._ops.OpOverload | None:
    target = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
        return None
    namespace, _, name = target._schema.name.partition("::")
    if not name.endswith("_") or name.endswith("__"):
        return None
    if not node.args or not isinstance(node.args[0], fx.Node):
        return None
    packet = getattr(getattr(torch.ops, namespace), name[:-1], None)
    pure = getattr(packet, target._overloadname, None)
    return pure if isinstance(pure, torch._ops.OpOverload) else None
