"""Convolutions over one dimension written as ones over two, where a compiler wants that."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx
from torch._ops import OpOverload
from torch.fx.node import Argument

aten = torch.ops.aten

IN_TWO_DIMENSIONS: Mapping[object, OpOverload] = {
    aten.conv1d.default: aten.conv2d.default,
    aten.conv1d.padding: aten.conv2d.padding,
    aten.conv_transpose1d.default: aten.conv_transpose2d.input,
}
"""The operator over two dimensions that computes, on one more of size 1, what one over one does."""

_NEUTRAL: Mapping[object, tuple[int | None, ...]] = {
    aten.conv1d.default: (1, 0, 1, None),
    aten.conv1d.padding: (1, None, 1, None),
    aten.conv_transpose1d.default: (1, 0, 0, None, 1),
}
"""Entries for the new dimension of stride, padding and the like, as an operator takes them."""


def geometry_of_two(conv: fx.Node) -> list[Argument]:
    """Stride, padding, dilation and groups of a convolution, for two dimensions.

    Args:
        conv: Calls one of `IN_TWO_DIMENSIONS`.

    Returns:
        What comes behind the bias, with an entry for the new dimension in front; numbers and
        words stay as they are.

    Examples:
        >>> graph = fx.Graph()
        >>> x, weight = graph.placeholder("x"), graph.placeholder("weight")
        >>> geometry_of_two(graph.call_function(aten.conv1d.default, (x, weight, None, [2], [3])))
        [[1, 2], [0, 3]]
    """
    return [
        [fill, *value] if isinstance(value, (list, tuple)) else value
        for value, fill in zip(conv.args[3:], _NEUTRAL[conv.target], strict=False)
    ]
