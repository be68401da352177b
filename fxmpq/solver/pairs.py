"""The multiple-choice program with costs of pairs: what two groups take together."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import add, le, sub

from fxmpq.solver.branch import Cover
from fxmpq.solver.instance import Instance, Option

Terms = tuple[int, ...]
"""What something adds to the objective, and then to each limit."""


@dataclass(frozen=True)
class Pair:
    """What two groups take together beyond what each takes by itself.

    Args:
        left: Place of one group.
        right: Place of the other.
        entries: Terms by an option's key of the left group and one of the right.
    """

    left: int
    right: int
    entries: Mapping[tuple[int, int], Terms]


@dataclass(frozen=True)
class PairedInstance:
    """Pick one option a group; the sums of values and costs are those of options and of pairs.

    Args:
        instance: Groups, limits, and what options take by themselves.
        pairs: No two between the same groups.
    """

    instance: Instance
    pairs: tuple[Pair, ...]

    def totals(self, keys: Collection[int]) -> Terms:
        """The objective and the use of each limit of a choice.

        Args:
            keys: Of one option a group.
        """
        picked = _picked(self.instance, keys)
        found = (self.instance.constant, *(0 for _ in self.instance.limits))
        for option in picked:
            found = plus(found, terms_of(option))
        for pair in self.pairs:
            found = plus(found, pair.entries[picked[pair.left].key, picked[pair.right].key])
        return found

    def is_met_by(self, keys: Collection[int]) -> bool:
        """Whether a choice keeps every limit, without rounding."""
        used = self.totals(keys)[1:]
        return all(map(le, used, self.instance.limits))


def pair_cover(paired: PairedInstance, keys: Collection[int]) -> Cover:
    """Find a cover inequality that cuts off a choice which exceeds a limit.

    Groups are given their least one by one, those of the least use first, while the limit stays
    exceeded: the options that remain cannot be chosen together, nor can others of their groups
    that take as much in the limit and the same in every pair.

    Args:
        paired: The program.
        keys: Of one option a group.

    Returns:
        The inequality.
    """
    used = paired.totals(keys)[1:]
    limits = paired.instance.limits
    row = next(row for row, limit in enumerate(limits) if used[row] > limit) + 1
    picked = _picked(paired.instance, keys)
    kept = set(range(len(picked)))
    floors = [min(terms_of(option)[row] for option in group) for group in paired.instance.groups]

    def bound(held: set[int]) -> int:
        own = sum(terms_of(picked[place])[row] for place in held)
        rest = sum(floor for place, floor in enumerate(floors) if place not in held)
        return own + rest + sum(_pair_bound(pair, picked, held, row) for pair in paired.pairs)

    for place in sorted(kept, key=lambda place: terms_of(picked[place])[row] - floors[place]):
        if bound(kept - {place}) > limits[row - 1]:
            kept.discard(place)
    found: set[int] = set()
    for place in kept:
        mine, group = picked[place], paired.instance.groups[place]
        rows = pair_rows(place, [option.key for option in group], paired.pairs)
        found |= {
            option.key
            for option in group
            if terms_of(option)[row] >= terms_of(mine)[row] and rows[option.key] == rows[mine.key]
        }
    return Cover(frozenset(found), len(kept) - 1)


def classes(place: int, group: Sequence[Option], pair: Pair) -> list[list[int]]:
    """Keys of a group's options, together where a pair treats them alike.

    Args:
        place: Of the group.
        group: Its options.
        pair: Of which the group is an end.
    """
    rows = pair_rows(place, [option.key for option in group], [pair])
    found: dict[tuple[object, ...], list[int]] = {}
    for key, row in rows.items():
        found.setdefault(tuple(row), []).append(key)
    return list(found.values())


def pair_rows(
    place: int, keys: Sequence[int], pairs: Iterable[Pair]
) -> dict[int, list[tuple[int, Terms]]]:
    """List what each option of a group takes with every option of every neighbour.

    Args:
        place: Of the group.
        keys: Of its options.
        pairs: Those of other groups count for nothing.

    Returns:
        By the option's key: the neighbours' options and the terms, in the same order for all.
    """
    rows: dict[int, list[tuple[int, Terms]]] = {key: [] for key in keys}
    for pair in pairs:
        if place in (pair.left, pair.right):
            side = 0 if place == pair.left else 1
            for ends, terms in pair.entries.items():
                if ends[side] in rows:
                    rows[ends[side]].append((ends[1 - side], terms))
    return rows


def _pair_bound(pair: Pair, picked: Sequence[Option], held: set[int], row: int) -> int:
    """The least that a pair takes of a limit where some groups are held at their options."""
    left = picked[pair.left].key if pair.left in held else None
    right = picked[pair.right].key if pair.right in held else None
    return min(
        terms[row]
        for ends, terms in pair.entries.items()
        if left in (None, ends[0]) and right in (None, ends[1])
    )


def _picked(instance: Instance, keys: Collection[int]) -> list[Option]:
    found = frozenset(keys)
    return [next(option for option in group if option.key in found) for group in instance.groups]


def terms_of(option: Option) -> Terms:
    """What an option takes by itself."""
    return (option.value, *option.costs)


def plus(left: Terms, right: Terms) -> Terms:
    """Add terms, each to its own."""
    return tuple(map(add, left, right))


def minus(left: Terms, right: Terms) -> Terms:
    """Subtract terms, each from its own."""
    return tuple(map(sub, left, right))
