"""Models that remember: what they write in one call and read in the next."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import fx

from fxmpq.errors import TraceError


def written_buffers(graph: fx.GraphModule) -> frozenset[str]:
    """Names of the buffers that a graph writes to.

    Parameters are none: a model that scales its weights before its first call in evaluation mode
    (RWKV) does so once, and a graph of it in each call anew.

    Args:
        graph: As exported, before its in-place operators are made pure.
    """
    buffers = {name for name, _ in graph.named_buffers(remove_duplicate=False)}
    found = set()
    for node in graph.graph.nodes:
        first = node.args[0] if node.args else None
        is_mutable = isinstance(node.target, torch._ops.OpOverload) and (
            node.target._schema.is_mutable
        )
        if is_mutable and isinstance(first, fx.Node) and first.op == "get_attr":
            found.add(str(first.target))
    return frozenset(found & buffers)


def check_keeps_nothing(graph: fx.GraphModule, written: Collection[str], model: str) -> None:
    """Check that no result depends on the calls before, which a pure graph would forget.

    A counter of calls that nothing else reads is gone from a canonical graph, and legal. A norm
    by the batch's own statistics reads the stored ones only to update them.

    Args:
        graph: A canonical graph.
        written: From `written_buffers`.
        model: Its class, for the error.

    Raises:
        TraceError: Naming a buffer that is written in one call and read in the next.
    """
    for node in graph.graph.find_nodes(op="get_attr"):
        readers = [user for user in node.users if "batch_norm" not in str(user.target)]
        if node.target in written and readers:
            raise TraceError(
                f"{model} writes to its buffer {node.target!r} in evaluation mode and reads it in "
                "the next call, but a graph keeps nothing between calls; pass it as an input and "
                "return it, or write to it in training mode only"
            )
