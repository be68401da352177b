"""Remove operators that change nothing at inference."""

from __future__ import annotations

import torch
from torch import Tensor, fx

aten = torch.ops.aten

_ASSERTIONS = (aten._assert_tensor_metadata.default,)
_DROPOUTS = (
    aten.dropout.default,
    aten.feature_dropout.default,
    aten.alpha_dropout.default,
    aten.feature_alpha_dropout.default,
)
_IDENTITIES = (
    aten.detach.default,
    aten.detach_.default,
    aten.alias.default,
    aten.lift_fresh_copy.default,
)
_CASTS = (aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten._to_copy.default)


def drop_identities(graph: fx.GraphModule) -> int:
    """Remove dropout, detach, no-op casts, copies and assertions, in place on the graph.

    A dropout that the model applies at inference too (`training=True`) stays. A copy is what
    `x[:, i] = y` becomes in a functional program, `copy(x[:, i], y)`; it goes where it neither
    broadcasts nor casts. It has no derivative in torch (2.13).

    Args:
        graph: A graph exported in eval mode; changed in place.

    Returns:
        How many nodes were removed.
    """
    removed = 0
    for node in reversed(list(graph.graph.nodes)):
        if not is_needless(node):
            continue
        if node.target not in _ASSERTIONS:
            # A copy gives what is copied, not what it is copied onto.
            kept = 1 if node.target is aten.copy.default else 0
            node.replace_all_uses_with(node.args[kept])
        graph.graph.erase_node(node)
        removed += 1
    if removed:
        graph.recompile()
    return removed


def is_needless(node: fx.Node) -> bool:
    """Whether a node changes nothing at inference, by the values that the export recorded."""
    if node.op != "call_function":
        return False
    if node.target is aten.copy.default:
        return _is_plain_copy(node)
    return node.target in _ASSERTIONS or _is_identity(node) or _is_noop_cast(node)


def _is_identity(node: fx.Node) -> bool:
    return node.target in _IDENTITIES or (node.target in _DROPOUTS and node.args[2] is False)


def _is_plain_copy(node: fx.Node) -> bool:
    """Whether `copy(onto, source)` has the shape, dtype and device of its source."""
    values = [arg.meta.get("val") for arg in node.args[:2] if isinstance(arg, fx.Node)]
    found = [
        (str(value.shape), value.dtype, value.device)
        for value in values
        if isinstance(value, Tensor)
    ]
    return len(found) == 2 and found[0] == found[1]


def _is_noop_cast(node: fx.Node) -> bool:
    """Whether a cast keeps dtype and device, by the values the export recorded."""
    if node.target not in _CASTS or not isinstance(node.args[0], fx.Node):
        return False
    before, after = node.args[0].meta.get("val"), node.meta.get("val")
    if not (isinstance(before, Tensor) and isinstance(after, Tensor)):
        return False
    same = before.dtype == after.dtype and before.device == after.device
    return same and not node.kwargs.get("copy", False)
