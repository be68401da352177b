"""Sizes that the export fixed, as sentences."""

from __future__ import annotations

from collections.abc import Sequence

from fxmpq.graph.state import FixedSize

_NAMES = {0: "batch size", 1: "sequence length"}


def fixed_size_lines(sizes: Sequence[FixedSize]) -> list[str]:
    """Say which sizes are fixed, and why; inputs with the same in one sentence.

    Args:
        sizes: Of a graph's state.

    Returns:
        One line a size and reason; none where all are free.

    Examples:
        >>> reason = "the model fixes it at net.py:3: x + ones"
        >>> fixed_size_lines([FixedSize(name, 0, 2, reason) for name in ("ids", "mask")])
        ['the batch size of ids and mask is fixed at 2: the model fixes it at net.py:3: x + ones']
    """
    arguments: dict[tuple[int, int, str], list[str]] = {}
    for entry in sizes:
        key = (entry.dimension, entry.size, entry.reason)
        arguments.setdefault(key, []).append(entry.argument)
    return [
        f"the {_NAMES[dimension]} of {' and '.join(names)} is fixed at {size}: {reason}"
        for (dimension, size, reason), names in arguments.items()
    ]
