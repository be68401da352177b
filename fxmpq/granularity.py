"""Granularity: how many values share a scale."""

from __future__ import annotations

from dataclasses import dataclass

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


def granularity_suffix(granularity: Granularity) -> str:
    """What a granularity adds to a format's name: `t`, nothing, or `b` and the size.

    Examples:
        >>> [granularity_suffix(found) for found in (PerTensor(), PerChannel(), PerBlock(32))]
        ['t', '', 'b32']
    """
    if isinstance(granularity, PerBlock):
        return f"b{granularity.size}"
    return "t" if isinstance(granularity, PerTensor) else ""
