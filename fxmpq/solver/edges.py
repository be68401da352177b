"""The bit-width program with format changes: what two groups cost together."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from fxmpq.costs.terms import Edge, check_edges, exact_sum
from fxmpq.errors import InfeasibleBudgetError
from fxmpq.solver.branch import check_solver
from fxmpq.solver.exact import allowance, common_denominator, exact
from fxmpq.solver.instance import Option
from fxmpq.solver.pair_search import find_paired_optimum
from fxmpq.solver.pairs import Pair, PairedInstance, Terms
from fxmpq.solver.program import (
    IntegerProgram,
    Row,
    Solution,
    keeping_torch_threads,
    solution_of,
    solve_program,
)
from fxmpq.solver.ties import Table


@dataclass(frozen=True)
class PairedProgram:
    """Tables and edges in exact integers, and how to read a choice of theirs.

    Args:
        paired: Values are the objective times `scale`; limits that are infinite are left out.
        program: The same without edges, which names the options.
        scale: Makes every entry of the objective an integer.
    """

    paired: PairedInstance
    program: IntegerProgram
    scale: int

    @classmethod
    def of(
        cls,
        objective: Table,
        rows: Sequence[Row],
        ties: Sequence[Sequence[str]] = (),
        edges: Sequence[Edge] = (),
    ) -> PairedProgram:
        """Merge ties and find the integers.

        Args:
            objective: Group to precision to value.
            rows: Limits, with their edges.
            ties: Groups that must take the same precision.
            edges: Of the objective.

        Raises:
            FxmpqError: If a row or an edge lacks an entry, a tie or an end of an edge is unknown,
                or tied groups share no precision.
        """
        limited = [row for row in rows if row.limit != math.inf]
        table, between, scale = _integers(objective, edges)
        found = [_limited(row) for row in limited]
        program = IntegerProgram.of(table, [row for row, _ in found], ties)
        check_edges("the objective", edges, objective)
        for row in limited:
            check_edges("a limit", row.edges, objective)
        terms = _merged(program, [between, *(edges for _, edges in found)])
        groups = tuple(
            tuple(_added(option, terms) for option in group) for group in program.instance.groups
        )
        place = {option.key: index for index, group in enumerate(groups) for option in group}
        tables: dict[tuple[int, int], dict[tuple[int, int], Terms]] = {}
        for (left, right), entry in terms.items():
            if place[left] != place[right]:
                tables.setdefault((place[left], place[right]), {})[left, right] = entry
        pairs = tuple(Pair(*ends, entries) for ends, entries in tables.items())
        return cls(PairedInstance(replace(program.instance, groups=groups), pairs), program, scale)

    @classmethod
    def of_any(
        cls, objective: Table, rows: Sequence[Row], ties: Sequence[Sequence[str]] = ()
    ) -> PairedProgram:
        """As `of`; without edges it is `IntegerProgram.of` and no pairs."""
        if any(row.edges for row in rows):
            return cls.of(objective, rows, ties)
        program = IntegerProgram.of(objective, rows, ties)
        return cls(PairedInstance(program.instance, ()), program, program.scale)


def solve_with_edges(
    objective: Table,
    rows: Sequence[Row],
    *,
    edges: Sequence[Edge] = (),
    ties: Sequence[Sequence[str]] = (),
    solver: str = "cbc",
    time_limit: float = 60.0,
    max_gap: float = 0.0,
) -> Solution:
    """Minimise a sum over groups and edges within limits on such sums, to a proven optimum.

        min  sum_g objective[g][c_g] + sum_e e(c_producer, c_reader)

    over one precision `c_g` a group, within all rows, whose sums count their own edges. It is
    the program that `solve_program` solves where there are no edges. Numbers are read as the
    decimals they print as, and what counts as within a limit is decided without rounding;
    objectives nearer to each other than the solver's tolerance count as equal. The choice of
    formats by the number of conversions between layers is the third phase of AIMET's automatic
    mixed precision; here their cost is part of the one program.

    Args:
        objective: Group to precision to value; values may be negative.
        rows: Limits over the same groups and precisions, and edges between them.
        edges: What pairs of groups add to the objective.
        ties: Groups that must take the same precision.
        solver: `cbc` or `highs`.
        time_limit: Seconds, after which the best choice found is returned.
        max_gap: Relative gap at which the search may stop.

    Returns:
        The choices, with a proven bound.

    Raises:
        InfeasibleBudgetError: If no choice is within all rows.
        BudgetError: If the time limit passed before any choice was found.
        FxmpqError: If the solver's name, a tie or an end of an edge is unknown, or tied groups
            share no precision.

    Examples:
        >>> hurts = {"a": 1.0, "b": 1.0, "c": 2.0}
        >>> losses = {group: {"w4a8": loss, "fp32": 0.0} for group, loss in hurts.items()}
        >>> time = {group: {"w4a8": 1, "fp32": 3} for group in losses}
        >>> change = {"w4a8": {"w4a8": 0, "fp32": 2}, "fp32": {"w4a8": 2, "fp32": 0}}
        >>> edges = (Edge("a", "b", change), Edge("b", "c", change))
        >>> found = solve_with_edges(losses, [Row(time, 7, edges)])  # 3 in float cost 9
        >>> found.choices, found.objective
        ({'a': 'w4a8', 'b': 'w4a8', 'c': 'fp32'}, 2.0)
    """
    check_solver(solver)
    began = time.perf_counter()
    program = PairedProgram.of(objective, rows, ties, edges)
    with keeping_torch_threads():
        best = find_paired_optimum(
            program.paired, solver=solver, time_limit=time_limit, max_gap=max_gap
        )
    if best is None:
        raise InfeasibleBudgetError("no choice is within all limits")
    choices = program.program.choices(best.keys)
    choices = {group: choices[group] for group in objective}
    own = [objective[group][name] for group, name in choices.items()]
    total = exact_sum([*own, *(edge.cost(choices) for edge in edges)])
    bound = None if best.bound >= best.objective else best.bound / program.scale
    return solution_of(choices, total, bound, began)


def solve_rows(
    objective: Table,
    rows: Sequence[Row],
    *,
    edges: Sequence[Edge] = (),
    ties: Sequence[Sequence[str]] = (),
    solver: str = "cbc",
    time_limit: float = 60.0,
    max_gap: float = 0.0,
) -> Solution:
    """Solve the bit-width program, with edges where there are any.

    Args:
        objective: As for `solve_with_edges`, and all that follows.
        rows: Limits.
        edges: Of the objective.
        ties: Groups that must take the same precision.
        solver: `cbc` or `highs`.
        time_limit: In seconds.
        max_gap: Relative gap at which the search may stop.

    Returns:
        What `solve_program` finds if nothing has edges, else what `solve_with_edges` does.

    Raises:
        FxmpqError: As they do.
    """
    if edges or any(row.edges for row in rows):
        return solve_with_edges(
            objective,
            rows,
            edges=edges,
            ties=ties,
            solver=solver,
            time_limit=time_limit,
            max_gap=max_gap,
        )
    return solve_program(
        objective, rows, ties=ties, solver=solver, time_limit=time_limit, max_gap=max_gap
    )


# An edge in integers: by both precisions.
_Integers = Mapping[tuple[str, str], int]


def _integers(
    table: Table, edges: Sequence[Edge]
) -> tuple[dict[str, dict[str, int]], list[tuple[Edge, _Integers]], int]:
    """A table and its edges as integers of one unit, and the factor that makes them so."""
    numbers = [exact(value) for row in table.values() for value in row.values()]
    factor = common_denominator([*numbers, *(exact(value) for *_, value in _entries(edges))])
    whole = {
        group: {name: int(exact(value) * factor) for name, value in row.items()}
        for group, row in table.items()
    }
    between: list[tuple[Edge, _Integers]] = [
        (
            edge,
            {(left, right): int(exact(value) * factor) for left, right, value in _entries([edge])},
        )
        for edge in edges
    ]
    return whole, between, factor


def _entries(edges: Sequence[Edge]) -> Iterator[tuple[str, str, float]]:
    for edge in edges:
        for left, row in edge.costs.items():
            for right, value in row.items():
                yield left, right, value


def _limited(row: Row) -> tuple[Row, list[tuple[Edge, _Integers]]]:
    """A row of integers, its limit too, and its edges."""
    table, between, factor = _integers(row.table, row.edges)
    if row.limit == -math.inf:
        return Row(table, row.limit), between
    whole = all(
        isinstance(value, int)
        for value in (
            *(value for entries in row.table.values() for value in entries.values()),
            *(value for *_, value in _entries(row.edges)),
        )
    )
    return Row(table, math.floor(allowance(row.limit, whole=whole) * factor)), between


def _merged(
    program: IntegerProgram, rows: Sequence[Sequence[tuple[Edge, _Integers]]]
) -> dict[tuple[int, int], Terms]:
    """What every two options take together, the objective first; ends in order of their groups.

    Ends that are tied are one option twice.
    """
    keys: dict[str, dict[str, int]] = {}
    for key, (members, name) in enumerate(program.entries):
        for group in members:
            keys.setdefault(group, {})[name] = key
    found: dict[tuple[int, int], list[int]] = {}
    for row, edges in enumerate(rows):
        for edge, values in edges:
            left, right = keys[edge.producer], keys[edge.reader]
            is_tied = left == right
            for (name, other), value in values.items():
                if name in left and other in right and (not is_tied or name == other):
                    ends = sorted((left[name], right[other]))
                    found.setdefault((ends[0], ends[1]), [0] * len(rows))[row] += value
    return {ends: tuple(entry) for ends, entry in found.items()}


def _added(option: Option, terms: Mapping[tuple[int, int], Terms]) -> Option:
    """An option with what edges between its own groups take."""
    entry = terms.get((option.key, option.key))
    if entry is None:
        return option
    costs = tuple(map(sum, zip(option.costs, entry[1:], strict=True)))
    return Option(option.key, option.value + entry[0], costs)
