"""Remove operators that change nothing at inference."""

from __future__ import annotations

import torch
from torch import Tensor, fx

aten = torch.ops.aten

_ASSERTIONS = (aten._assert_tensor_metadata.default,)
_DROPOUTS = (aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default)
_IDENTITIES = (
    aten.detach.default,
    aten.detach_.default,
    aten.alias.default,
    aten.lift_fresh_copy.default,
)
_CASTS = (aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten._to_copy.default)


def drop_identities(graph: fx.GraphModule) -> int:
    """Remove dropout, detach, no-op casts and metadata assertions, in place on the graph.

    A dropout that the model applies at inference too (`training=True`) stays.

    Args:
        graph: A graph exported in eval mode; changed in place.

    Returns:
        How many nodes were removed.
    """
    removed = 0
    for node in reversed(list(graph.graph.nodes)):
        if node.op != "call_function":
            continue
        if node.target in _ASSERTIONS:
            graph.graph.erase_node(node)
        elif _is_identity(node) or _is_noop_cast(node):
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
        else:
            continue
        removed += 1
    graph.recompile()
    return removed


def _is_identity(node: fx.Node) -> bool:
    return node.target in _IDENTITIES or (node.target in _DROPOUTS and node.args[2] is False)


def _is_noop_cast(node: fx.Node) -> bool:
    """Whether a cast keeps dtype and device, by the values the export recorded."""
    if node.target not in _CASTS or not isinstance(node.args[0], fx.Node):
        return False
    before, after = node.args[0].meta.get("val"), node.meta.get("val")
    if not (isinstance(before, Tensor) and isinstance(after, Tensor)):
        return False
    same = before.dtype == after.dtype and before.device == after.device
    return same and not node.kwargs.get("copy", False)
