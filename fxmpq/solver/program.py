"""The bit-width program: one precision a group, any number of limits, a proven optimum."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction

import torch

from fxmpq.costs.terms import Edge
from fxmpq.errors import FxmpqError, InfeasibleBudgetError
from fxmpq.solver.branch import check_solver
from fxmpq.solver.exact import Number, allowance, common_denominator, exact
from fxmpq.solver.instance import Instance, Option
from fxmpq.solver.search import Start, find_optimum
from fxmpq.solver.ties import Table, merge_ties


@dataclass(frozen=True)
class Row:
    """One limit: the sum of the chosen entries must not exceed `limit`.

    Args:
        table: Group to precision to value.
        limit: The greatest sum allowed; between integers without rounding, else up to the
            limit's own rounding, `2^-50` of it, so that a limit that equals a sum of fractions
            is met by that sum.
        edges: What pairs of groups add to the sum.

    Raises:
        FxmpqError: If the limit is not a number.
    """

    table: Table
    limit: Number
    edges: tuple[Edge, ...] = ()

    def __post_init__(self) -> None:
        if math.isnan(self.limit):
            raise FxmpqError("a limit is NaN; give a number")


@dataclass(frozen=True)
class Solution:
    """The answer of the program.

    Args:
        choices: Precision name per group.
        objective: Sum of the chosen values.
        bound: Proven lower bound on the objective.
        status: `optimal`, or `feasible` when the time limit or the allowed gap came first.
        seconds: Wall time.
    """

    choices: dict[str, str]
    objective: float
    bound: float
    status: str
    seconds: float

    @property
    def gap(self) -> float:
        """`(objective - bound) / |objective|`, 0 when they agree, 1 for an objective of 0."""
        difference = self.objective - self.bound
        if difference <= 0:
            return 0.0
        return min(difference / (abs(self.objective) or difference), sys.float_info.max)


@dataclass(frozen=True)
class IntegerProgram:
    """Tables in exact integers, and how to read a choice of theirs.

    Args:
        instance: Values are the objective times `scale`; limits that are infinite are left out.
        entries: Groups and precision of every option, by its key.
        scale: Makes every entry of the objective an integer.
    """

    instance: Instance
    entries: tuple[tuple[tuple[str, ...], str], ...]
    scale: int

    @classmethod
    def of(
        cls, objective: Table, rows: Sequence[Row], ties: Sequence[Sequence[str]] = ()
    ) -> IntegerProgram:
        """Merge ties and find the integers.

        Raises:
            FxmpqError: If a row lacks an entry or has edges, a tie is unknown, or tied groups
                share no precision.
        """
        _check_tables(objective, rows)
        units, names = merge_ties(objective, ties)
        values, scale = _integers(objective, units, names)
        costs = [_limited(row, units, names) for row in rows if row.limit != math.inf]
        keys = iter(range(len(values)))
        groups = tuple(
            tuple(
                Option(key, values[key], tuple(column[key] for column, _ in costs))
                for _, key in zip(found, keys, strict=False)
            )
            for found in names
        )
        entries = tuple(
            (tuple(members), name)
            for members, found in zip(units, names, strict=True)
            for name in found
        )
        return cls(Instance(groups, tuple(limit for _, limit in costs)), entries, scale)

    def choices(self, keys: Collection[int]) -> dict[str, str]:
        """The precision of every group, given the keys of the options chosen."""
        picked = [self.entries[key] for key in keys]
        return {group: name for members, name in picked for group in members}

    def keys(self, choices: Mapping[str, str]) -> frozenset[int]:
        """The inverse of `choices`.

        Raises:
            FxmpqError: If a group has no choice or one it lacks, or tied ones differ.
        """
        found = {
            key
            for key, (members, name) in enumerate(self.entries)
            if all(choices.get(group) == name for group in members)
        }
        for options in self.instance.groups:
            if found.isdisjoint(option.key for option in options):
                members = ", ".join(self.entries[options[0].key][0])
                legal = ", ".join(self.entries[option.key][1] for option in options)
                raise FxmpqError(
                    f"the choices to start from give no precision that {members} may take "
                    f"together; it may be {legal}"
                )
        return frozenset(found)


def solve_program(
    objective: Table,
    rows: Sequence[Row],
    *,
    ties: Sequence[Sequence[str]] = (),
    solver: str = "cbc",
    time_limit: float = 60.0,
    max_gap: float = 0.0,
    start: Mapping[str, str] | None = None,
) -> Solution:
    """Minimise `sum_g objective[g][c_g]` over one precision `c_g` a group, within all rows.

    The multiple-choice knapsack with any number of limits. Numbers are read as the decimals
    they print as, and what counts as within a limit is decided without rounding. The solver
    gets the program reduced and scaled (`find_optimum`): raw sensitivities of 1e-9 lie below
    its tolerances, and a raw limit of 1e12 BOPs hides a thousand of them.

    Args:
        objective: Group to precision to value; values may be negative.
        rows: Limits over the same groups and precisions.
        ties: Groups that must take the same precision.
        solver: `cbc` or `highs`.
        time_limit: Seconds, after which the best choice found is returned.
        max_gap: Relative gap at which the search may stop.
        start: Precision per group to begin from, as the choices at a similar limit, to save time;
            it need not be within the rows.

    Returns:
        The choices, with a proven bound.

    Raises:
        InfeasibleBudgetError: If no choice is within all rows.
        BudgetError: If the time limit passed before any choice was found.
        FxmpqError: If the solver's name or a tie is unknown, tied groups share no precision, or
            the start is no choice.

    Examples:
        >>> objective = {"a": {"w4a8": 1.0, "w8a8": 0.0}, "b": {"w4a8": 3.0, "w8a8": 0.0}}
        >>> size = {"a": {"w4a8": 4, "w8a8": 8}, "b": {"w4a8": 4, "w8a8": 8}}
        >>> solve_program(objective, [Row(size, 12)]).choices
        {'a': 'w4a8', 'b': 'w8a8'}
    """
    check_solver(solver)
    began = time.perf_counter()
    program = IntegerProgram.of(objective, rows, ties)
    known = None if start is None else Start(program.keys(start))
    with keeping_torch_threads():
        best = find_optimum(
            program.instance,
            solver=solver,
            time_limit=time_limit,
            max_gap=max_gap,
            start=known,
        )
    if best is None:
        raise InfeasibleBudgetError("no choice is within all limits")
    choices = program.choices(best.keys)
    choices = {group: choices[group] for group in objective}
    total = _total(objective[group][name] for group, name in choices.items())
    bound = None if best.bound >= best.objective else best.bound / program.scale
    return solution_of(choices, total, bound, began)


def solution_of(
    choices: dict[str, str], total: float, bound: Fraction | None, began: float
) -> Solution:
    """Say what was found and what is proven of it.

    Args:
        choices: Precision name per group.
        total: Their objective.
        bound: Proven lower bound of the objective, exact; `None` where it reaches it.
        began: Reading of `time.perf_counter` when the work began.
    """
    return Solution(
        choices=choices,
        objective=total,
        bound=total if bound is None else min(total, float(bound)),
        status="optimal" if bound is None else "feasible",
        seconds=time.perf_counter() - began,
    )


def _check_tables(objective: Table, rows: Sequence[Row]) -> None:
    if not objective or not all(objective.values()):
        raise FxmpqError("the program needs at least one group, each with a precision")
    for row in rows:
        if row.edges:
            raise FxmpqError(
                f"a limit has {len(row.edges)} edges, which add what format changes between "
                "groups cost; ask for program='ilp', the one form that counts them"
            )
        for group, entries in objective.items():
            missing = set(entries) - set(row.table.get(group, {}))
            if missing:
                raise FxmpqError(
                    f"a limit lacks group {group!r} at {', '.join(sorted(missing))}; it needs "
                    "every group and precision of the objective"
                )


def _total(numbers: Iterable[float]) -> float:
    found = list(numbers)
    return sum(found) if all(isinstance(number, int) for number in found) else math.fsum(found)


def _limited(
    row: Row, units: Sequence[Sequence[str]], names: Sequence[Sequence[str]]
) -> tuple[list[int], int]:
    """A row's entries and its limit as integers of one unit."""
    entries, factor = _integers(row.table, units, names)
    whole = all(
        isinstance(value, int) for options in row.table.values() for value in options.values()
    )
    limit = (
        allowance(row.limit, whole=whole) if math.isfinite(row.limit) else Fraction(-sys.maxsize)
    )
    return entries, math.floor(limit * factor)


def _integers(
    table: Table, units: Sequence[Sequence[str]], names: Sequence[Sequence[str]]
) -> tuple[list[int], int]:
    """Every unit's summed entries as integers, and the factor that makes them so."""
    numbers = [
        sum((exact(table[group][name]) for group in members), Fraction(0))
        for members, found in zip(units, names, strict=True)
        for name in found
    ]
    factor = common_denominator(numbers)
    return [int(number * factor) for number in numbers], factor


@contextmanager
def keeping_torch_threads() -> Iterator[None]:
    """Give torch its threads back: CBC sets the number for the whole process."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
