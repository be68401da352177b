"""Weight size: what the stored weights take, scales included."""

from __future__ import annotations

import math

from fxmpq.formats import NumberFormat, Precision, ScaleKind
from fxmpq.graph.state import Group
from fxmpq.quantizers.scales import scale_shape

_SCALE_BYTES = {ScaleKind.FLOAT32: 4, ScaleKind.E8M0: 1, ScaleKind.E4M3: 1}
_TENSOR_SCALE_BYTES = {ScaleKind.E4M3: 4}


def weight_bytes(group: Group, precision: Precision) -> int:
    """Bytes of a group's weights: `sum ceil(N b / 8) + S` over its distinct weights.

    `N` is a weight's number of values and `S` what its scales take; symmetric codes and floats
    need no zero points. With `C` output channels, `S` is 4 per tensor, `4 C` per channel, and
    per block 4 (`float32`) or 1 (E8M0, E4M3) for each of the `C ceil(N / (C size))` blocks, plus
    4 for the tensor's own scale beside those in E4M3. Weights in `fp32` take `4 N`.

    Args:
        group: Its layers' weight shapes count, tied weights once.
        precision: Of the group.

    Returns:
        Exact number of bytes.
    """
    total = 0
    for shape, axis in _distinct_weights(group):
        values = math.prod(shape)
        if precision.weight is None:
            total += 4 * values
        else:
            total += -(-values * precision.weight.bits // 8)
            total += _scale_bytes(shape, axis, precision.weight)
    return total


def _scale_bytes(shape: tuple[int, ...], axis: int, number_format: NumberFormat) -> int:
    kind = number_format.scale_kind
    count = math.prod(scale_shape(shape, axis, number_format.granularity))
    return _SCALE_BYTES[kind] * count + _TENSOR_SCALE_BYTES.get(kind, 0)


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
