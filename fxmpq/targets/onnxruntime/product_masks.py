"""Masks on products of two activations, in a form that takes fewer passes over them."""

from __future__ import annotations

import math

import torch
from torch import fx
from torch.fx.node import Argument

from fxmpq.graph.state import node_shape

aten = torch.ops.aten

_WHERE = aten.where.ScalarOther
_LARGEST = torch.finfo(torch.float32).max
_DIGITS = 24
"""Bits of a `float32` number's significand."""


def apply_masks_as_terms(
    graph: fx.Graph, product: fx.Node, sizes: torch.Size, largest: float
) -> None:
    """Replace `where` on a product by a sum or a product with a term made of the mask, in place.

    A mask of attention is the same for all heads, the scores are not: `where(mask, x, v)` is `x`
    plus `where(mask, 0, v)`, which is made once and small, where every `x` is too small to show
    beside `v`; and `where(mask, x, 0)` is `x` times the mask, up to the sign of zero. Everything
    else stays as it is: a product that may overflow or that `v` does not hide, and a mask that is
    no smaller than the product.

    Args:
        graph: A graph being rewritten.
        product: Finite, as products of codes are.
        sizes: Its shape in the example.
        largest: What none of its numbers exceeds.
    """
    for source, most in [(product, largest), *_multiples(product, largest)]:
        for reader in list(source.users):
            if reader.target is _WHERE and reader.args[1] is source and most <= _LARGEST:
                _replace(graph, reader, sizes, most)


def _multiples(product: fx.Node, largest: float) -> list[tuple[fx.Node, float]]:
    """What is the product times a number, as attention's scores are, and what none exceeds."""
    found = []
    for reader in product.users:
        factor = reader.args[1] if len(reader.args) == 2 else None
        is_multiple = reader.target is aten.mul.Tensor and reader.args[0] is product
        if is_multiple and isinstance(factor, (int, float)):
            found.append((reader, largest * abs(factor)))
    return found


def _replace(graph: fx.Graph, reader: fx.Node, sizes: torch.Size, largest: float) -> None:
    """Replace one `where` if it may be, and if that gains anything."""
    mask, source, other = reader.args
    assert isinstance(source, fx.Node)
    assert isinstance(other, (int, float))
    if not _is_smaller(mask, sizes):
        return
    with graph.inserting_before(reader):
        if other == 0:
            factor = graph.call_function(aten.where.Scalar, (mask, 1.0, 0.0))
            found = graph.call_function(aten.mul.Tensor, (source, factor))
        elif largest < _hidden_beside(other):
            term = graph.call_function(aten.where.Scalar, (mask, 0.0, float(other)))
            found = graph.call_function(aten.add.Tensor, (source, term))
        else:
            return
    reader.replace_all_uses_with(found)
    graph.erase_node(reader)


def _hidden_beside(other: float) -> float:
    """What may be added to a `float32` number without changing it: less than this."""
    if math.isinf(other):
        return math.inf
    _, exponent = math.frexp(other)
    # Half of the distance to the neighbour towards zero, which may be half of the other's.
    return math.ldexp(1.0, exponent - _DIGITS - 2)


def _is_smaller(mask: Argument, sizes: torch.Size) -> bool:
    """Whether a mask is repeated along an axis of a product."""
    found = node_shape(mask) if isinstance(mask, fx.Node) else None
    return found is not None and 2 * found.numel() <= sizes.numel()
