"""Writes into views: finding programs whose in-place operators change more than their argument."""

from __future__ import annotations

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram


def writes_through_views(program: ExportedProgram) -> bool:
    """Whether a later node reads memory that an in-place operator wrote under another name.

    `x[:, 0] += 1` writes to a view of `x`; a reader of `x` behind it must see the sum, which
    renaming the view's readers alone would lose.

    Args:
        program: As `torch.export` returns it.
    """
    order = {node: position for position, node in enumerate(program.graph.nodes)}
    aliases: dict[int, list[fx.Node]] = {}
    for node in order:
        storage = _storage(node)
        if storage is not None:
            aliases.setdefault(storage, []).append(node)
    for node, position in order.items():
        if not is_in_place(node):
            continue
        written = _written_name(node)
        for other in aliases.get(_storage(written) or -1, []):
            if order[other] >= position or _written_name(other) is written:
                continue
            if any(order[reader] > position for reader in other.users):
                return True
    return False


def is_in_place(node: fx.Node) -> bool:
    """Whether a node writes to its first argument."""
    target = node.target
    return (
        isinstance(target, torch._ops.OpOverload)
        and target._schema.is_mutable
        and bool(node.args)
        and isinstance(node.args[0], fx.Node)
    )


def _written_name(node: fx.Node) -> fx.Node:
    """The node that first made the tensor that a chain of in-place operators returns."""
    while is_in_place(node):
        source = node.args[0]
        assert isinstance(source, fx.Node)
        node = source
    return node


def _storage(node: fx.Node) -> int | None:
    value = node.meta.get("val")
    return value.untyped_storage()._cdata if isinstance(value, Tensor) else None
