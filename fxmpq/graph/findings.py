"""What a target's rules found in a graph: fusions, joins, integer biases; why some do not fire."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fusion:
    """Operators that a target runs as one: what is between them is never stored.

    Args:
        name: The rule, as `conv-add-relu`.
        nodes: Names of the nodes, in order.
        layer: The layer it begins with; empty where it begins with another operator.
    """

    name: str
    nodes: tuple[str, ...]
    layer: str = ""


@dataclass(frozen=True)
class Join:
    """Two layers that must share a precision.

    Args:
        rule: The rule that joins them, a key of `JOINS`, or `tied` where the user does.
        layer: The later layer.
        other: The earlier one.
    """

    rule: str
    layer: str
    other: str


@dataclass(frozen=True)
class BiasUnits:
    """In what units the target stores a layer's bias, as integers of 32 bits.

    The unit of an output channel with weight scale `s_w` and codes of `b` bits is
    `s_x s_w / 2^max(width - b, 0)`.

    Args:
        source: Module name of the activation quantizer whose scale is `s_x`.
        width: Bits that codes of fewer bits are multiplied up to; 0 if none are.
    """

    source: str
    width: int = 0


@dataclass(frozen=True)
class Missed:
    """A rule that did not fire.

    Args:
        rule: Name of the fusion, or a key of `JOINS`.
        place: The layer or operator it would have begun with.
        reason: Why not, for people.
    """

    rule: str
    place: str
    reason: str
