"""Weight size: what the stored weights take, scales included."""

from __future__ import annotations

import math

from fxmpq.formats import Precision
from fxmpq.graph.state import Group

SCALE_BYTES = 4
"""One `float32` scale per output channel; symmetric codes need no zero points."""


def weight_bytes(group: Group, precision: Precision) -> int:
    """Bytes of a group's weights: `sum ceil(N b / 8) + 4 C` over its distinct weights.

    `N` is a weight's number of values and `C` its number of output channels; float weights
    take `4 N`.

    Args:
        group: Its layers' weight shapes count, tied weights once.
        precision: Of the group.

    Returns:
        Exact number of bytes.
    """
    total = 0
    for shape, axis in _distinct_weights(group):
        values = math.prod(shape)
        if precision.weight_bits is None:
            total += 4 * values
        else:
            total += -(-values * precision.weight_bits // 8) + SCALE_BYTES * shape[axis]
    return total


def weight_bits(group: Group, precision: Precision) -> int:
    """Bits of a group's weight codes alone, `sum N b`: the measure of average bit-width.

    Args:
        group: Its layers' weight shapes count, tied weights once.
        precision: Of the group; float counts 32.

    Returns:
        Exact number of bits.
    """
    bits = precision.weight_bits or 32
    return bits * sum(math.prod(shape) for shape, _ in _distinct_weights(group))


def _distinct_weights(group: Group) -> list[tuple[tuple[int, ...], int]]:
    by_name = {layer.weight: (layer.weight_shape, layer.channel_axis) for layer in group.layers}
    return list(by_name.values())
