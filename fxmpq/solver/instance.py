"""The multiple-choice program in exact integers: reduced to what is still open."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple


class Option(NamedTuple):
    """One candidate of one group.

    Attributes:
        key: Identifies it among all options of the program.
        value: What it adds to the objective.
        costs: What it takes of each limit.
    """

    key: int
    value: int
    costs: tuple[int, ...]


@dataclass(frozen=True)
class Instance:
    """Pick one option a group: least sum of values, no sum of costs above its limit.

    `reduce_instance` makes one in which every group has two options or more, the least value
    and the least cost of each kind in every group are 0, and no option takes more than a limit
    has. That is also what makes it well-conditioned: divided by its limit, every coefficient of
    a row lies in [0, 1].

    Args:
        groups: Options by group.
        limits: What each sum of costs may come to.
        settled: Keys of options that every solution has.
        constant: Value of the settled options and of the shifts: what to add to the sum of
            values for the objective before the reduction.
        rows: Which limit before the reduction each limit was, and what it was divided by; not
            given where none was removed or divided.
    """

    groups: tuple[tuple[Option, ...], ...]
    limits: tuple[int, ...]
    settled: tuple[int, ...] = ()
    constant: int = 0
    rows: tuple[tuple[int, int], ...] = ()

    @property
    def options(self) -> list[Option]:
        """All options, group by group."""
        return [option for group in self.groups for option in group]

    def keeping(self, kept: Iterable[bool]) -> Instance:
        """The instance with some of its options only: those of a true entry in `kept`."""
        stays = iter(kept)
        groups = tuple(tuple(option for option in group if next(stays)) for group in self.groups)
        return replace(self, groups=groups)

    def usage(self, chosen: Iterable[Option]) -> tuple[int, ...]:
        """What a choice takes of each limit."""
        picked = list(chosen)
        return tuple(sum(option.costs[row] for option in picked) for row in range(len(self.limits)))

    def is_met_by(self, chosen: Iterable[Option]) -> bool:
        """Whether a choice keeps every limit, without rounding."""
        return all(
            used <= limit for used, limit in zip(self.usage(chosen), self.limits, strict=True)
        )


def reduce_instance(instance: Instance, ceiling: int | None = None) -> Instance | None:
    """Remove what no solution worth having contains, and normalise the rest.

    Dropped are options that another one of their group beats or equals in value and in every
    cost, options that alone take more than a limit leaves when all other groups take their
    least, and, with a `ceiling`, options that alone lift the objective above it. Groups with
    one option left are settled. Rows that cannot be violated any more disappear, and the
    others are divided by their greatest common divisor.

    Args:
        instance: Any.
        ceiling: Objective, in units of `instance`, that a solution must not exceed.

    Returns:
        An instance with the same solutions (but for dominated ones and those above the
        ceiling), or `None` if there is none.
    """
    # The objective is one more row while there is a ceiling to keep.
    groups = [_undominated(group) for group in instance.groups]
    worst = sum(max(option.value for option in group) for group in groups)
    top = worst if ceiling is None else ceiling - instance.constant
    limits = (*instance.limits, top)
    shrunk = True
    while shrunk:
        least = [_least(group) for group in groups]
        room = [limit - sum(floor[row] for floor in least) for row, limit in enumerate(limits)]
        if min(room) < 0:
            return None
        kept = [
            [option for option in group if _fits(option, floor, room)]
            for group, floor in zip(groups, least, strict=True)
        ]
        if not all(kept):
            return None
        shrunk = sum(map(len, kept)) < sum(map(len, groups))
        groups = kept
    return _normalised(instance, groups)


def _undominated(group: Sequence[Option]) -> list[Option]:
    kept: list[Option] = []
    for option in sorted(group, key=lambda option: (option.value, option.costs)):
        # Sorted by value and then costs: only one that is kept already can dominate.
        if not any(
            all(mine >= theirs for mine, theirs in zip(option.costs, other.costs, strict=True))
            for other in kept
        ):
            kept.append(option)
    return kept


def _least(group: Sequence[Option]) -> list[int]:
    columns = zip(*[(*option.costs, option.value) for option in group], strict=True)
    return [min(column) for column in columns]


def _fits(option: Option, floor: Sequence[int], room: Sequence[int]) -> bool:
    taken = (*option.costs, option.value)
    return all(mine - low <= left for mine, low, left in zip(taken, floor, room, strict=True))


def _normalised(instance: Instance, groups: Sequence[Sequence[Option]]) -> Instance:
    """Shift groups to zero, settle single options, and drop or divide rows."""
    floors = [_least(group) for group in groups]
    constant = instance.constant + sum(floor[-1] for floor in floors)
    limits = [
        limit - sum(floor[row] for floor in floors) for row, limit in enumerate(instance.limits)
    ]
    open_groups = [(group, floor) for group, floor in zip(groups, floors, strict=True) if group[1:]]
    rows: list[int] = []
    divisors: list[int] = []
    for row, limit in enumerate(limits):
        costs = [
            [option.costs[row] - floor[row] for option in group] for group, floor in open_groups
        ]
        if sum(map(max, costs)) > limit:
            rows.append(row)
            divisors.append(math.gcd(*[cost for group in costs for cost in group]))
    shifted = tuple(
        tuple(
            Option(
                option.key,
                option.value - floor[-1],
                tuple(
                    (option.costs[row] - floor[row]) // divisor
                    for row, divisor in zip(rows, divisors, strict=True)
                ),
            )
            for option in group
        )
        for group, floor in open_groups
    )
    before = instance.rows or tuple((row, 1) for row in range(len(limits)))
    return Instance(
        groups=shifted,
        limits=tuple(limits[row] // divisor for row, divisor in zip(rows, divisors, strict=True)),
        rows=tuple(
            (before[row][0], before[row][1] * divisor)
            for row, divisor in zip(rows, divisors, strict=True)
        ),
        settled=(*instance.settled, *(group[0].key for group in groups if not group[1:])),
        constant=constant,
    )
