"""Granularity: how many values share a scale."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from fxmpq.errors import PrecisionError


@dataclass(frozen=True)
class PerTensor:
    """One scale for the whole tensor."""


@dataclass(frozen=True)
class PerChannel:
    """One scale for each output channel of a weight."""


@dataclass(frozen=True)
class PerBlock:
    """One scale for every `size` consecutive input values of an output channel.

    A weight `[out, in, *kernel]` is flattened to `[out, in']` and cut along `in'`; the last block
    of a channel may be shorter.

    Args:
        size: Values that share a scale, at least 2.

    Raises:
        PrecisionError: If the size is smaller.
    """

    size: int

    def __post_init__(self) -> None:
        if self.size < 2:
            raise PrecisionError(
                f"a block of {self.size} values cannot share a scale; the smallest block is 2, "
                "usual ones are 16, 32 and 128"
            )


Granularity = PerTensor | PerChannel | PerBlock
"""How many values share a scale."""


class Dynamic(Enum):
    """What a range that is found anew at every run covers; the value is what names say of it.

    `TENSOR`: a whole tensor has one range. `ROW`: each row of its last dimension, a token, has one.
    """

    TENSOR = "d"
    ROW = "dt"


def granularity_suffix(granularity: Granularity) -> str:
    """What a granularity adds to a format's name: `t`, nothing, or `b` and the size.

    Examples:
        >>> [granularity_suffix(found) for found in (PerTensor(), PerChannel(), PerBlock(32))]
        ['t', '', 'b32']
    """
    if isinstance(granularity, PerBlock):
        return f"b{granularity.size}"
    return "t" if isinstance(granularity, PerTensor) else ""


def dynamic_suffix(dynamic: Dynamic | None) -> str:
    """What a range found at every run adds to a format's name: `d`, `dt`, or nothing.

    Examples:
        >>> [dynamic_suffix(found) for found in (None, Dynamic.TENSOR, Dynamic.ROW)]
        ['', 'd', 'dt']
    """
    return "" if dynamic is None else dynamic.value


def read_dynamic(suffix: str | None) -> Dynamic | None:
    """What a suffix of `dynamic_suffix` stands for; nothing is `None` too.

    Examples:
        >>> read_dynamic("dt")
        <Dynamic.ROW: 'dt'>
    """
    return Dynamic(suffix) if suffix else None
