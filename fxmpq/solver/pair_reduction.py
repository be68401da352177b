"""What no solution of a program with pairs can contain, and its normal form."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from operator import le

from fxmpq.solver.instance import Instance, Option
from fxmpq.solver.pairs import Pair, PairedInstance, Terms, minus, pair_rows, plus, terms_of


def reduce_pairs(paired: PairedInstance, ceiling: int | None = None) -> PairedInstance | None:
    """Remove what no solution worth having contains, and normalise the rest.

    What an end of a pair takes at least, whatever the other end takes, is moved to the option of
    that end, until nothing of it is left: a pair with one group settled disappears so. Dropped
    are options that another one of their group beats or equals in every term whatever its
    neighbours take, and options that alone take more than a limit leaves. Groups with one option
    left are settled, and limits that cannot be exceeded any more disappear.

    Args:
        paired: Any.
        ceiling: Objective, in units of `paired`, that a solution must not exceed.

    Returns:
        One with the same solutions (but for dominated ones and those above the ceiling), or
        `None` if there is none.
    """
    instance, pairs = paired.instance, list(paired.pairs)
    groups = [list(group) for group in instance.groups]
    worst = sum(max(option.value for option in group) for group in groups)
    worst += sum(max(terms[0] for terms in pair.entries.values()) for pair in pairs)
    top = worst if ceiling is None else ceiling - instance.constant
    room: Terms = (top, *instance.limits)
    constant = (0,) * len(room)
    count = 0
    while count != sum(map(len, groups)):
        count = sum(map(len, groups))
        pairs = [_moved(pair, groups) for pair in pairs]
        pairs = [pair for pair in pairs if any(map(any, pair.entries.values()))]
        floors = [_least(map(terms_of, group)) for group in groups]
        for floor in floors:
            constant, room = plus(constant, floor), minus(room, floor)
        groups = [
            [_shifted(option, minus(terms_of(option), floor)) for option in group]
            for group, floor in zip(groups, floors, strict=True)
        ]
        if min(room) < 0:
            return None
        groups = [
            _undominated(place, [option for option in group if _fits(option, room)], pairs)
            for place, group in enumerate(groups)
        ]
        if not all(groups):
            return None
        pairs = [_restricted(pair, groups) for pair in pairs]
    left = Instance(
        tuple(map(tuple, groups)),
        room[1:],
        settled=instance.settled,
        constant=instance.constant + constant[0],
    )
    return _opened(PairedInstance(left, tuple(pairs)))


def split_pairs(paired: PairedInstance) -> PairedInstance:
    """Move what an end of a pair takes at least to its option, and drop nothing else.

    Args:
        paired: Any.

    Returns:
        The same program; without its pairs it bounds the sums from below.
    """
    groups = [list(group) for group in paired.instance.groups]
    pairs = tuple(_moved(pair, groups) for pair in paired.pairs)
    return PairedInstance(replace(paired.instance, groups=tuple(map(tuple, groups))), pairs)


def _moved(pair: Pair, groups: list[list[Option]]) -> Pair:
    """Move to the options of `groups` what each end of the pair takes whatever the other does."""
    entries = dict(pair.entries)
    for side, place in enumerate((pair.left, pair.right)):
        floors = {
            option.key: _least(terms for ends, terms in entries.items() if ends[side] == option.key)
            for option in groups[place]
        }
        groups[place] = [
            _shifted(option, plus(terms_of(option), floors[option.key])) for option in groups[place]
        ]
        entries = {ends: minus(terms, floors[ends[side]]) for ends, terms in entries.items()}
    return replace(pair, entries=entries)


def _undominated(place: int, group: Sequence[Option], pairs: Sequence[Pair]) -> list[Option]:
    rows = pair_rows(place, [option.key for option in group], pairs)

    def is_beaten(option: Option, other: Option) -> bool:
        if max(minus(terms_of(other), terms_of(option))) > 0:
            return False
        both = zip(rows[option.key], rows[other.key], strict=True)
        return all(max(minus(theirs, mine)) <= 0 for (_, mine), (_, theirs) in both)

    kept: list[Option] = []
    for option in sorted(group, key=terms_of):
        if not any(is_beaten(option, other) for other in kept):
            kept.append(option)
    return kept


def _restricted(pair: Pair, groups: Sequence[Sequence[Option]]) -> Pair:
    """A pair without the options that are gone."""
    left = {option.key for option in groups[pair.left]}
    right = {option.key for option in groups[pair.right]}
    entries = {
        ends: terms for ends, terms in pair.entries.items() if ends[0] in left and ends[1] in right
    }
    return replace(pair, entries=entries)


def _opened(paired: PairedInstance) -> PairedInstance:
    """Settle groups of one option, and drop the limits that cannot be exceeded."""
    instance, pairs = paired.instance, paired.pairs
    most = (0,) * (1 + len(instance.limits))
    for group in instance.groups:
        most = plus(most, _greatest(map(terms_of, group)))
    for pair in pairs:
        most = plus(most, _greatest(pair.entries.values()))
    rows = [row for row, limit in enumerate(instance.limits) if most[row + 1] > limit]
    places = [place for place, group in enumerate(instance.groups) if len(group) > 1]
    new = {place: index for index, place in enumerate(places)}
    settled = [group[0].key for group in instance.groups if len(group) == 1]

    def cut(terms: Terms) -> Terms:
        return (terms[0], *(terms[row + 1] for row in rows))

    groups = tuple(
        tuple(_shifted(option, cut(terms_of(option))) for option in instance.groups[place])
        for place in places
    )
    left = Instance(
        groups,
        tuple(instance.limits[row] for row in rows),
        settled=(*instance.settled, *settled),
        constant=instance.constant,
    )
    kept = (
        Pair(
            new[pair.left],
            new[pair.right],
            {ends: cut(terms) for ends, terms in pair.entries.items()},
        )
        for pair in pairs
    )
    return PairedInstance(left, tuple(kept))


def _shifted(option: Option, terms: Terms) -> Option:
    return Option(option.key, terms[0], terms[1:])


def _fits(option: Option, room: Terms) -> bool:
    return all(map(le, terms_of(option), room))


def _least(terms: Iterable[Terms]) -> Terms:
    return tuple(map(min, zip(*terms, strict=True)))


def _greatest(terms: Iterable[Terms]) -> Terms:
    return tuple(map(max, zip(*terms, strict=True)))
