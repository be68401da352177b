"""Groups that must take the same precision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction

from fxmpq.errors import FxmpqError, closest
from fxmpq.solver.exact import exact, plain

Table = Mapping[str, Mapping[str, float]]


def merge_ties(
    table: Table, ties: Sequence[Sequence[str]]
) -> tuple[list[list[str]], list[list[str]]]:
    """Partition the groups so that tied ones are together, with the precisions they share.

    Ties that share a group are one tie.

    Args:
        table: Group to precision to anything.
        ties: Groups that must take the same precision.

    Returns:
        The groups of each unit, in the order of the table, and the precisions of each unit,
        in the order of its first group.

    Raises:
        FxmpqError: If a tie names an unknown group, or tied groups share no precision.

    Examples:
        >>> table = {"a": {"w4": 0, "w8": 0}, "b": {"w8": 0}, "c": {"w4": 0}}
        >>> merge_ties(table, [("a", "b")])
        ([['a', 'b'], ['c']], [['w8'], ['w4']])
    """
    unit = {group: [group] for group in table}
    for tie in ties:
        for group in tie:
            if group not in table:
                raise FxmpqError(
                    f"the tie {tuple(tie)} names {group!r}, which is no group; closest: "
                    f"{closest(group, table)}"
                )
            if unit[group] is not unit[tie[0]]:
                unit[tie[0]].extend(unit[group])
                for member in unit[group]:
                    unit[member] = unit[tie[0]]
    place = {group: index for index, group in enumerate(table)}
    merged = [sorted(members, key=place.__getitem__) for members in unit.values()]
    units = [members for group, members in zip(table, merged, strict=True) if members[0] == group]
    return units, [_shared(members, table) for members in units]


def smallest(table: Table, ties: Sequence[Sequence[str]]) -> float:
    """Return the least sum of entries that one precision a group reaches.

    Args:
        table: Group to precision to value.
        ties: Groups that must take the same precision.

    Returns:
        The sum; an integer if all entries are.

    Examples:
        >>> table = {"a": {"w4": 1, "w8": 5}, "b": {"w4": 9, "w8": 2}}
        >>> smallest(table, ()), smallest(table, [("a", "b")])
        (3, 7)
    """
    units, names = merge_ties(table, ties)
    found = [
        [sum((exact(table[group][name]) for group in members), Fraction(0)) for name in shared]
        for members, shared in zip(units, names, strict=True)
    ]
    return plain(sum(map(min, found), Fraction(0)))


def _shared(members: Sequence[str], table: Table) -> list[str]:
    shared = [name for name in table[members[0]] if all(name in table[group] for group in members)]
    if not shared:
        found = "; ".join(f"{group!r} has {', '.join(table[group])}" for group in members)
        raise FxmpqError(f"tied groups must share a precision, and these have none: {found}")
    return shared
