"""Peaks in the bit-width program: the largest of several sums, as a limit or to be minimised."""

from __future__ import annotations

import math
import time
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from fxmpq.costs.terms import Moment
from fxmpq.errors import BudgetError, InfeasibleBudgetError
from fxmpq.solver.edges import solve_rows
from fxmpq.solver.exact import Number, allowance, common_denominator, exact, plain
from fxmpq.solver.forms import ANY_GAP
from fxmpq.solver.program import Row, Solution
from fxmpq.solver.ties import Table

# More sums of one moment than this are not listed.
_MOST_SUMS = 10_000


@dataclass(frozen=True)
class Peak:
    """A peak's moments in integers of one unit.

    Args:
        moments: Fixed part, and group to precision to what is alive.
        factor: Integers in 1.
        whole: Whether all numbers were integers.
    """

    moments: tuple[tuple[int, Mapping[str, Mapping[str, int]]], ...]
    factor: int
    whole: bool

    @classmethod
    def of(cls, moments: Sequence[Moment]) -> Peak:
        """Find the integers."""
        numbers = [moment.fixed for moment in moments]
        numbers += [v for moment in moments for row in moment.rows.values() for v in row.values()]
        factor = common_denominator(map(exact, numbers))
        found = tuple(
            (
                int(exact(moment.fixed) * factor),
                {
                    group: {name: int(exact(value) * factor) for name, value in row.items()}
                    for group, row in moment.rows.items()
                },
            )
            for moment in moments
        )
        return cls(found, factor, all(isinstance(number, int) for number in numbers))

    def total(self, choices: Mapping[str, str]) -> int:
        """The largest sum under a choice."""
        return max(
            fixed + sum(row[choices[group]] for group, row in rows.items())
            for fixed, rows in self.moments
        )

    def smallest(self) -> int:
        """What no choice goes below: the largest of the moments' own least sums."""
        return max(
            fixed + sum(min(row.values()) for row in rows.values()) for fixed, rows in self.moments
        )

    def sums(self, low: int, high: int) -> Sequence[int]:
        """All that a moment can come to between two of its sums, sorted; or more than that.

        Args:
            low: The least.
            high: The greatest.
        """
        found: set[int] = set()
        for fixed, rows in self.moments:
            reached = {fixed}
            for row in rows.values():
                reached = {total + value for total in reached for value in set(row.values())}
                if len(reached) > _MOST_SUMS:
                    return range(low, high + 1)
            found |= reached
        return sorted(total for total in found if low <= total <= high)

    def rows(self, limit: int, shape: Table) -> list[Row]:
        """The limits that keep the peak within one: of every moment that can exceed it.

        A moment that never exceeds another one needs no limit of its own:
        `max_c (A(c) - B(c)) = A_0 - B_0 + sum_g max_p (A_g(p) - B_g(p)) <= 0`.

        Args:
            limit: In integers.
            shape: Group to precision to anything, of all groups.
        """
        exceeding = [
            (most, fixed, rows)
            for fixed, rows in self.moments
            if (most := fixed + sum(max(row.values()) for row in rows.values())) > limit
        ]
        kept: list[tuple[int, Mapping[str, Mapping[str, int]]]] = []
        for _, fixed, rows in sorted(exceeding, key=lambda moment: -moment[0]):
            if not any(_excess(fixed, rows, *other) <= 0 for other in kept):
                kept.append((fixed, rows))
        return [
            Row(
                {group: rows.get(group) or dict.fromkeys(row, 0) for group, row in shape.items()},
                limit - fixed,
            )
            for fixed, rows in kept
        ]


def peak_rows(moments: Sequence[Moment], limit: Number, shape: Table) -> list[Row]:
    """Turn a limit on a peak into limits on sums: one a moment that can exceed it.

    Args:
        moments: Of the peak.
        limit: What it may come to.
        shape: Group to precision to anything, of all groups.

    Returns:
        Limits without rounding. Moments that never exceed another one are left out.

    Examples:
        >>> row = {"w8a8": 10, "fp32": 40}
        >>> moments = [Moment("conv", 5, {"a": row}), Moment("relu", 0, {"a": row})]
        >>> [found.limit for found in peak_rows(moments, 30, {"a": row})]
        [25]
    """
    peak = Peak.of(moments)
    return peak.rows(math.floor(allowance(limit, whole=peak.whole) * peak.factor), shape)


def minimize_peak(
    moments: Sequence[Moment],
    loss: Table,
    most: Number,
    rows: Sequence[Row] = (),
    *,
    ties: Sequence[Sequence[str]] = (),
    solver: str = "cbc",
    time_limit: float = 60.0,
    max_gap: float = 0.0,
) -> Solution:
    """Find the least peak of any choice whose summed loss is within a limit, to a proven optimum.

    By bisection over the sums that moments reach: each step looks for a choice at which no moment
    exceeds the middle one, by the integer program, and its peak is the next upper end. Of the
    choices of least peak it then finds the one of least loss.

    Args:
        moments: Of the peak.
        loss: Group to precision to loss.
        most: The greatest sum of losses allowed.
        rows: Further limits, with edges or without.
        ties: Groups that must take the same precision.
        solver: `cbc` or `highs`.
        time_limit: Seconds, after which the best choice found is returned.
        max_gap: Relative gap at which the bisection may stop.

    Returns:
        The choices; the objective is their peak, with a proven bound.

    Raises:
        InfeasibleBudgetError: If no choice is within the limits.
        BudgetError: If the time limit passed before any choice was found.
        FxmpqError: As `solve_program`.

    Examples:
        >>> row = {"w8a8": 10, "fp32": 40}
        >>> moments = [Moment("first", 0, {"a": row, "b": row}), Moment("second", 0, {"c": row})]
        >>> losses = {group: {"w8a8": 1.0, "fp32": 0.0} for group in ("a", "b", "c")}
        >>> found = minimize_peak(moments, losses, 1.0)
        >>> found.objective, found.choices["c"]
        (50, 'fp32')
    """
    began = time.perf_counter()
    peak = Peak.of(moments)
    kept = [*rows, Row(loss, most)]

    def within(further: Sequence[Row], gap: float) -> Solution | None:
        left = time_limit - (time.perf_counter() - began)
        try:
            return solve_rows(
                loss, [*kept, *further], ties=ties, solver=solver, time_limit=left, max_gap=gap
            )
        except InfeasibleBudgetError:
            return None

    best = within([], ANY_GAP)
    if best is None:
        raise InfeasibleBudgetError("no choice is within all limits")
    low, high = peak.smallest(), peak.total(best.choices)
    sums = peak.sums(low, high)
    try:
        while high - low > Fraction(max_gap) * high:
            place = (bisect_left(sums, low) + bisect_left(sums, high)) // 2
            found = within(peak.rows(sums[place], loss), ANY_GAP)
            if found is None:
                low = sums[place + 1]
            else:
                best, high = found, peak.total(found.choices)
        best = within(peak.rows(high, loss), max_gap) or best
        high = peak.total(best.choices)
    except BudgetError:
        # Time is out: the best so far will do.
        pass
    return Solution(
        choices=best.choices,
        objective=plain(Fraction(high, peak.factor)),
        bound=plain(Fraction(low, peak.factor)),
        status="optimal" if low >= high else "feasible",
        seconds=time.perf_counter() - began,
    )


def _excess(
    fixed: int,
    rows: Mapping[str, Mapping[str, int]],
    other_fixed: int,
    others: Mapping[str, Mapping[str, int]],
) -> int:
    """By how much the first moment exceeds the other one at most."""
    found = fixed - other_fixed
    for group, row in rows.items():
        other = others.get(group)
        found += max(value - (other[name] if other else 0) for name, value in row.items())
    return found - sum(min(row.values()) for group, row in others.items() if group not in rows)
