"""Operation counts: MACs, and MACs weighted by the widths of their operands."""

from __future__ import annotations

from fxmpq.formats import Precision
from fxmpq.graph.state import Group

FLOAT_BITS = 32


def macs(group: Group, precision: Precision) -> int:
    """Multiply-accumulates of a group for one sample; they do not depend on the precision.

    Args:
        group: Its layers and products count.
        precision: Any.

    Returns:
        Exact count.
    """
    return sum(member.macs for member in group.members)


def bops(group: Group, precision: Precision) -> int:
    """Bit operations of a group for one sample: `sum MAC * b_w * b_a`.

    Both operands of a product of two activations are activations: `MAC * b_a * b_a`. A small
    float counts all its bits, as an integer does; fp32 counts 32.

    Args:
        group: Its layers and products count.
        precision: Of the group.

    Returns:
        Exact count.
    """
    weight_width = precision.weight_bits or FLOAT_BITS
    activation_width = precision.activation_bits or FLOAT_BITS
    weighted = sum(layer.macs for layer in group.layers) * weight_width
    return (
        weighted + sum(product.macs for product in group.products) * activation_width
    ) * activation_width


def float_bops(multiply_accumulates: int) -> int:
    """Bit operations of what is computed in float."""
    return multiply_accumulates * FLOAT_BITS * FLOAT_BITS
