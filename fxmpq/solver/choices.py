"""The multiple-choice problem in numbers: ties merged, shifted, and pruned."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fxmpq.errors import FxmpqError, closest

Table = Mapping[str, Mapping[str, float]]
Array = NDArray[np.float64]

_BISECTIONS = 50
_PRICE_STEPS = 100
_PRUNING_SLACK = 1e-9
_LIMIT_ROUNDING = 2.0**-50
_BOUND_ROUNDING = 2.0**-48


@dataclass(frozen=True)
class Row:
    """One limit: the sum of the chosen entries must not exceed `limit`.

    Args:
        table: Group to precision to value.
        limit: The greatest sum allowed.

    Raises:
        FxmpqError: If the limit is not a number.
    """

    table: Table
    limit: float

    def __post_init__(self) -> None:
        if math.isnan(self.limit):
            raise FxmpqError("a limit is NaN; give a number")


@dataclass(frozen=True)
class Unit:
    """Groups that choose together, with what is left of their options.

    Args:
        groups: Tied groups, usually one.
        names: Precision name of each option.
        values: Objective of each option above the unit's least, `[options]`.
        usage: What each option takes of each limit above the unit's least,
            `[limits, options]`.
    """

    groups: tuple[str, ...]
    names: tuple[str, ...]
    values: Array
    usage: Array

    def keep(self, kept: NDArray[np.bool_]) -> Unit:
        """The same unit with some of its options."""
        names = tuple(name for name, stays in zip(self.names, kept, strict=True) if stays)
        return replace(self, names=names, values=self.values[kept], usage=self.usage[:, kept])


@dataclass(frozen=True)
class Problem:
    """Choose one option a unit, minimising the sum of values within the rooms.

    Args:
        units: All of them.
        offset: What to add to the sum of values for the objective.
        rooms: What each limit leaves above the units' least usage, `[limits]`. It holds the
            limit's own rounding, `2^-50` of it, so that a limit that equals a sum of fractions
            is met by that sum; sums of integers below `2^50` stay exact.
    """

    units: tuple[Unit, ...]
    offset: float
    rooms: Array


def build_problem(objective: Table, rows: Sequence[Row], ties: Sequence[Sequence[str]]) -> Problem:
    """Merge ties and shift every unit so that its least value and usage are zero.

    Args:
        objective: Group to precision to value.
        rows: Limits over the same groups and precisions.
        ties: Groups that must take the same precision.

    Returns:
        The problem; a negative room means that a limit cannot be met.

    Raises:
        FxmpqError: If there are no groups, a row lacks an entry, a tie names an unknown group,
            or tied groups share no precision.
    """
    _check_tables(objective, rows)
    units = []
    offsets: list[float] = []
    rooms: list[list[float]] = [[row.limit, abs(row.limit) * _LIMIT_ROUNDING] for row in rows]
    for members in _tied(list(objective), ties):
        names = [
            name
            for name in objective[members[0]]
            if all(name in objective[member] for member in members)
        ]
        if not names:
            raise FxmpqError(f"the tied groups {', '.join(members)} share no precision")
        values = _summed(objective, members, names)
        usage = np.array([_summed(row.table, members, names) for row in rows]).reshape(
            len(rows), len(names)
        )
        offsets.append(float(values.min()))
        least = usage.min(axis=1)
        for room, part in zip(rooms, least, strict=True):
            room.append(-float(part))
        units.append(
            Unit(tuple(members), tuple(names), values - values.min(), usage - least[:, None])
        )
    left = np.array([math.fsum(room) for room in rooms], dtype=np.float64)
    return Problem(tuple(units), math.fsum(offsets), left)


def drop_hopeless(problem: Problem) -> Problem:
    """Drop options that do not fit by themselves, or that another option beats everywhere.

    Args:
        problem: With non-negative rooms.

    Returns:
        A problem with the same optimum.
    """
    units = []
    for whole in problem.units:
        unit = whole.keep(np.all(whole.usage <= problem.rooms[:, None], axis=0))
        features = np.vstack([unit.values[None], unit.usage])
        no_worse = np.all(features[:, :, None] <= features[:, None, :], axis=0)
        better = no_worse & ~no_worse.T
        earlier_twin = np.triu(no_worse & no_worse.T, 1)
        units.append(unit.keep(~np.any(better | earlier_twin, axis=0)))
    return replace(problem, units=tuple(units))


@dataclass(frozen=True)
class Relaxed:
    """What a Lagrangian relaxation found.

    Args:
        picks: Option index per unit of `problem`; `None` if no price made a choice fit.
        value: Its sum of values, infinite if there is none.
        bound: Proven lower bound on the sum of values.
        problem: With the options gone that cannot be in an optimum.
    """

    picks: tuple[int, ...] | None
    value: float
    bound: float
    problem: Problem


def relax(problem: Problem) -> Relaxed:
    """Find a good choice and a lower bound by a Lagrangian, and drop what cannot be optimal.

    With each limit's usage measured in units of its room, every unit picks the option of
    least `value + price * usage`; the price is bisected until the choice just fits. Every
    price gives the lower bound `sum_u min(value + price * usage) - price * limits`, and an
    option whose reduced cost lifts the bound above the best choice cannot be optimal.

    Args:
        problem: After `drop_hopeless`, with non-negative rooms.

    Returns:
        The best choice found, the bound, and the smaller problem.
    """
    usable = problem.rooms > 0
    demands = [
        (unit.usage[usable] / problem.rooms[usable, None]).sum(axis=0) for unit in problem.units
    ]
    picks: list[int] | None = None
    value, bound = math.inf, -math.inf
    reduced: list[Array] = []

    def fits_at(price: float) -> bool:
        nonlocal picks, value, bound, reduced
        priced = [
            unit.values + price * demand
            for unit, demand in zip(problem.units, demands, strict=True)
        ]
        least = math.fsum(float(row.min()) for row in priced)
        paid = price * int(usable.sum())
        # a high price drowns the values: the bound gives way by what rounding may have added
        lower = least - paid - _BOUND_ROUNDING * (least + paid)
        if lower > bound:
            bound, reduced = lower, [row - row.min() for row in priced]
        found = [int(row.argmin()) for row in priced]
        if not _fits(problem, found):
            return False
        total = math.fsum(
            float(unit.values[pick]) for unit, pick in zip(problem.units, found, strict=True)
        )
        if total < value:
            picks, value = found, total
        return True

    low, high = 0.0, _first_price(problem)
    fits = fits_at(low)
    for _ in range(0 if fits else _PRICE_STEPS):
        if fits_at(high):
            break
        low, high = high, high * 4
    for _ in range(0 if fits or picks is None else _BISECTIONS):
        middle = math.sqrt(low * high) if low else high / 4
        low, high = (low, middle) if fits_at(middle) else (middle, high)
    if picks is None:
        return Relaxed(None, value, bound, problem)
    ceiling = value * (1 + _PRUNING_SLACK)
    kept = []
    for unit, extra, pick in zip(problem.units, reduced, picks, strict=True):
        stays = bound + extra <= ceiling
        stays[pick] = True
        kept.append((unit.keep(stays), int(stays[:pick].sum())))
    smaller = replace(problem, units=tuple(unit for unit, _ in kept))
    return Relaxed(tuple(pick for _, pick in kept), value, bound, smaller)


def _first_price(problem: Problem) -> float:
    """A price far too small to change a choice, in the order of the values."""
    largest = max(float(unit.values.max()) for unit in problem.units)
    return largest * 1e-15 if largest > 0 else 1.0


def _fits(problem: Problem, picks: Sequence[int]) -> bool:
    used = sum(unit.usage[:, pick] for unit, pick in zip(problem.units, picks, strict=True))
    return bool(np.all(used <= problem.rooms))


def _check_tables(objective: Table, rows: Sequence[Row]) -> None:
    if not objective or not all(objective.values()):
        raise FxmpqError("the program needs at least one group, each with a precision")
    for row in rows:
        for group, entries in objective.items():
            missing = set(entries) - set(row.table.get(group, {}))
            if missing:
                raise FxmpqError(
                    f"a limit lacks group {group!r} at {', '.join(sorted(missing))}; it needs "
                    "every group and precision of the objective"
                )


def _summed(table: Table, members: Sequence[str], names: Sequence[str]) -> Array:
    return np.array(
        [math.fsum(table[member][name] for member in members) for name in names], dtype=np.float64
    )


def _tied(groups: Sequence[str], ties: Sequence[Sequence[str]]) -> list[list[str]]:
    """Partition the groups, in order, so that tied ones are together."""
    home = {group: group for group in groups}
    for tie in ties:
        for group in tie:
            if group not in home:
                raise FxmpqError(f"a tie names {group!r}; closest: {closest(group, groups)}")
        merged = {home[group] for group in tie}
        first = next((group for group in groups if home[group] in merged), "")
        home = {group: home[first] if place in merged else place for group, place in home.items()}
    members: dict[str, list[str]] = {}
    for group in groups:
        members.setdefault(home[group], []).append(group)
    return list(members.values())
