"""Patterns on layer names, and the ties that users write with them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from fnmatch import fnmatchcase

from fxmpq.errors import PatternError, closest
from fxmpq.graph.findings import Join, Missed
from fxmpq.graph.joins import FoundJoins

Ties = Sequence[str | Sequence[str]]
"""Each entry a pattern, or several, whose layers share a precision."""


def matching(pattern: str, names: Sequence[str]) -> list[str]:
    """Names that an fnmatch pattern matches.

    Raises:
        PatternError: If there are none, with the closest names.
    """
    found = [name for name in names if fnmatchcase(name, pattern)]
    if not found:
        raise PatternError(
            f"no layer matches {pattern!r}; the closest of {len(names)} layers: "
            f"{closest(pattern, names)}"
        )
    return found


def read_exclude(exclude: Iterable[str]) -> tuple[str, ...]:
    """Read patterns of layers that stay float.

    Args:
        exclude: fnmatch patterns on layer names.

    Raises:
        PatternError: If it is one pattern instead of a list, or holds anything else.

    Examples:
        >>> read_exclude(["classifier", "encoder.0.*"])
        ('classifier', 'encoder.0.*')
    """
    if isinstance(exclude, str) or not isinstance(exclude, Iterable):
        raise PatternError(
            "exclude is a list of patterns on layer names, as ['classifier', 'encoder.0.*']; "
            f"found {exclude!r} alone"
        )
    patterns = tuple(exclude)
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise PatternError(
                f"exclude holds patterns on layer names, as 'encoder.0.*'; found {pattern!r}"
            )
    return patterns


def read_ties(ties: Ties) -> tuple[tuple[str, ...], ...]:
    """Read ties: one tuple of patterns each.

    Args:
        ties: Each entry a pattern, or several.

    Raises:
        PatternError: If it is one pattern instead of a list, or an entry holds anything else.

    Examples:
        >>> read_ties(["encoder.0.*", ("head", "encoder.1.*")])
        (('encoder.0.*',), ('head', 'encoder.1.*'))
    """
    if isinstance(ties, str) or not isinstance(ties, Sequence):
        raise PatternError(f"ties is a list of ties, as [{ties!r}] or [('conv1', 'conv2')]")
    read = []
    for tie in ties:
        patterns = (tie,) if isinstance(tie, str) else tie
        if not (
            isinstance(patterns, Sequence)
            and patterns
            and all(isinstance(pattern, str) for pattern in patterns)
        ):
            raise PatternError(
                f"a tie is a pattern on layer names, as 'encoder.0.*', or several; found {tie!r}"
            )
        read.append(tuple(patterns))
    return tuple(read)


def tied(
    ties: Sequence[Sequence[str]], names: Sequence[str], excluded: Collection[str] = ()
) -> FoundJoins:
    """Join the layers that each tie's patterns match.

    Args:
        ties: From `read_ties`.
        names: Of all layers, in graph order.
        excluded: Of those that stay in float, which a tie leaves out.

    Returns:
        Joins by the rule `tied`, and which layers were left out.

    Raises:
        PatternError: If a pattern matches no layer, or a tie one layer only.
    """
    joins: list[Join] = []
    missed: list[Missed] = []
    for tie in ties:
        found = {name for pattern in tie for name in matching(pattern, names)}
        if len(found) == 1:
            raise PatternError(
                f"the tie {tuple(tie)} matches one layer, {found.pop()!r}; a tie is of two or more"
            )
        kept = [name for name in names if name in found and name not in excluded]
        joins += [Join("tied", name, kept[0]) for name in kept[1:]]
        missed += [
            Missed("tied", name, "it stays in float")
            for name in names
            if name in found and name in excluded
        ]
    return FoundJoins(tuple(joins), tuple(missed))
