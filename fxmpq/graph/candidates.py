"""Candidates: the precisions that a user asks for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fxmpq.errors import PrecisionError
from fxmpq.formats import Precision


def read_candidates(
    candidates: Sequence[str | Precision] | None,
) -> tuple[Precision, ...] | None:
    """Read a list of precisions.

    Args:
        candidates: Names or precisions; `None` leaves the choice to the target.

    Raises:
        PrecisionError: If it is one precision instead of a list, or nothing, or one cannot be read.

    Examples:
        >>> [str(found) for found in read_candidates(["w4a8", "W8A8"])]
        ['w4a8', 'w8a8']
    """
    if isinstance(candidates, (str, Precision)):
        asked = str(candidates)
        raise PrecisionError(
            f"candidates is a list of precisions, as ['w4a8', 'w8a8']; found {asked!r} alone. For "
            f"this one write {[name.strip() for name in asked.split(',')]}"
        )
    if candidates is None:
        return None
    if not isinstance(candidates, Iterable):
        raise PrecisionError(
            f"candidates is a list of precisions, as ['w4a8', 'w8a8']; found {candidates!r}"
        )
    found = tuple(candidates)
    for entry in found:
        if not isinstance(entry, (str, Precision)):
            raise PrecisionError(f"candidates holds precisions, as 'w4a8'; found {entry!r}")
    if not found:
        raise PrecisionError(
            "candidates is empty; name precisions, as ['w4a8', 'w8a8'], or leave it out to try "
            "those of the target"
        )
    return tuple(Precision.parse(entry) for entry in found)
