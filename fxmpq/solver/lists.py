"""Exact enumeration of what a bound leaves open: lists of undominated partial choices.

Starting from the cheapest options under the prices of a Lagrangian bound, groups are opened one by
one. A list holds what the changes made so far come to, without those that another one beats in
value and in every cost (Nemhauser and Ullmann, 1969), those whose reduced costs exceed the slack
between the bound and the best choice known, and those that no further change brings within the
limits (Pisinger, 1995). Values and costs are integers of any size and never rounded, which a
solver with its tolerances cannot offer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import add, le, sub

from fxmpq.solver.instance import Instance, Option
from fxmpq.solver.relaxation import Floats, Relaxation

# Partial choices to make before giving up: some 5 ms, a fraction of what a solver takes.
_MOST = 5_000
# A choice found within a share of the slack may prove itself, and small shares take little time.
_SHARES = (1 / 16, 1 / 4, 1.0)
# With several limits a partial choice is compared with this many others.
_WINDOW = 8

# First cost, value, sum of reduced costs, place in the log of changes, other costs.
_State = tuple[int, int, float, int, tuple[int, ...]]
# What remains of the first limit, of the value and of the other limits.
_Room = tuple[int, int, tuple[int, ...]]


@dataclass(frozen=True)
class Listed:
    """What the lists found.

    Args:
        chosen: The best choice found, one option a group; `None` if there was none.
        complete: Whether it is proven that there is no better one.
    """

    chosen: tuple[Option, ...] | None
    complete: bool


def best_by_lists(
    instance: Instance, relaxation: Relaxation, prices: Floats, *, unit: int, most: int
) -> Listed:
    """Find the choice of least value, if one of `most` or less is within the limits.

    Args:
        instance: With one limit or more.
        relaxation: Of the instance.
        prices: A price per limit; the sharper their bound, the shorter the lists.
        unit: Of the relaxation's values.
        most: The greatest sum of values of interest.

    Returns:
        The best choice, and whether it is proven; it is not when the lists grow too long.
    """
    lower, reduced = relaxation.bound(prices)
    options = instance.options
    base = [options[index] for index in relaxation.cheapest(prices).tolist()]
    groups = relaxation.group.tolist()
    slack = most / unit - lower
    best: tuple[Option, ...] | None = None
    for share in _SHARES:
        allowed = share * slack * (1 + 1e-9)
        changes: dict[int, list[_Change]] = {}
        for index in (reduced <= allowed).nonzero()[0].tolist():
            group, option = groups[index], options[index]
            if option is not base[group]:
                change = _change(group, base[group], option, float(reduced[index]))
                changes.setdefault(group, []).append(change)
        lists = _Lists(instance, base, changes.values(), allowed, most)
        if not lists.run():
            return Listed(best, complete=False)
        chosen = lists.chosen()
        if chosen is not None:
            best = chosen
            most = sum(option.value for option in chosen) - 1
        # Reduced costs sum up to no more than a choice's distance from the bound.
        if most / unit - lower <= allowed:
            break
    return Listed(best, complete=True)


@dataclass(frozen=True)
class _Change:
    """Another option of a group than the cheapest, as its difference from that one."""

    group: int
    option: Option
    first: int
    value: int
    reduced: float
    others: tuple[int, ...]


def _change(group: int, base: Option, option: Option, reduced: float) -> _Change:
    first, *others = map(sub, option.costs, base.costs)
    return _Change(group, option, first, option.value - base.value, reduced, tuple(others))


class _Lists:
    """The list of partial choices, and how each came about."""

    def __init__(
        self,
        instance: Instance,
        base: Sequence[Option],
        changes: Iterable[Sequence[_Change]],
        allowed: float,
        most: int,
    ) -> None:
        self._base = base
        self._allowed = allowed
        # Groups that deviate at a high price first: few of their changes remain affordable.
        self._open = sorted(changes, key=lambda found: -min(change.reduced for change in found))
        first, *others = instance.limits
        self._rooms = self._all_rooms((first, most, tuple(others)))
        self._log: list[tuple[int, _Change]] = []
        first, *others = instance.usage(base)
        value = sum(option.value for option in base)
        self._states: list[_State] = [(first, value, 0.0, -1, tuple(others))]

    def run(self) -> bool:
        """Open all groups; false if the lists grow too long."""
        made = 0
        for changes, room in zip(self._open, self._rooms[1:], strict=True):
            states = [*self._states, *self._changed(changes, room)]
            made += len(states)
            if made > _MOST:
                return False
            states.sort()
            self._states = _undominated([state for state in states if _is_within(state, room)])
        return True

    def chosen(self) -> tuple[Option, ...] | None:
        """The best choice of the list, once all groups are open."""
        final = [state for state in self._states if _is_within(state, self._rooms[-1])]
        if not final:
            return None
        best = list(self._base)
        place = min(final, key=lambda state: state[1])[3]
        while place >= 0:
            place, change = self._log[place]
            best[change.group] = change.option
        return tuple(best)

    def _changed(self, changes: Sequence[_Change], room: _Room) -> list[_State]:
        made: list[_State] = []
        for change in changes:
            affordable = self._allowed - change.reduced
            most_first, most_value = room[0] - change.first, room[1] - change.value
            for first, value, reduced, place, others in self._states:
                if reduced <= affordable and first <= most_first and value <= most_value:
                    state = (
                        first + change.first,
                        value + change.value,
                        reduced + change.reduced,
                        len(self._log),
                        tuple(map(add, others, change.others)),
                    )
                    self._log.append((place, change))
                    made.append(state)
        return made

    def _all_rooms(self, room: _Room) -> list[_Room]:
        """What a partial choice may come to before each group is opened, and at the end.

        That is the limit plus what the groups still to be opened may take off at the most.
        """
        rooms = [room]
        for changes in reversed(self._open):
            first, value, others = rooms[-1]
            lows = [min(0, *column) for column in zip(*(c.others for c in changes), strict=True)]
            rooms.append(
                (
                    first - min(0, *(change.first for change in changes)),
                    value - min(0, *(change.value for change in changes)),
                    tuple(map(sub, others, lows)),
                )
            )
        return rooms[::-1]


def _is_within(state: _State, room: _Room) -> bool:
    return state[0] <= room[0] and state[1] <= room[1] and all(map(le, state[4], room[2]))


def _undominated(states: Sequence[_State]) -> list[_State]:
    """Without states that another beats or equals; they come sorted by first cost and value."""
    kept: list[_State] = []
    if not states or states[0][4]:
        for state in states:
            if not any(
                other[1] <= state[1] and all(map(le, other[4], state[4]))
                for other in kept[-_WINDOW:]
            ):
                kept.append(state)
        return kept
    for state in states:
        if not kept or state[1] < kept[-1][1]:
            kept.append(state)
    return kept
