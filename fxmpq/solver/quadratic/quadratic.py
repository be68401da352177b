"""The quadratic program: interactions between groups counted, the optimum proven.

Deng, Sharify, Orshansky (CLADO), arXiv 2307.05657.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from fxmpq.costs.table import CostTable
from fxmpq.sensitivity.interactions import shrunk_pairs
from fxmpq.sensitivity.sensitivity import Sensitivity
from fxmpq.solver.branch import check_solver
from fxmpq.solver.instance import Instance, Option, reduce_instance
from fxmpq.solver.program import IntegerProgram, Row, Solution, solve_program
from fxmpq.solver.quadratic.outer_approximation import Optimum, minimise
from fxmpq.solver.quadratic.planes import Choices
from fxmpq.solver.relaxation import Floats, Indices


def quadratic(
    sensitivity: Sensitivity,
    costs: CostTable,
    limits: Sequence[Row],
    *,
    ties: Sequence[Sequence[str]] = (),
    solver: str = "cbc",
    time_limit: float = 60.0,
    max_gap: float = 0.0,
    shrinkage: float | None = None,
) -> Solution:
    """Minimise `x^T M x` over one precision a group, within all limits, to a proven optimum.

    `x` holds a 1 for the chosen (group, precision) of every group; `M` is the matrix of
    interactions, `[entries, entries]`, positive semi-definite: `x^T M x` is the loss with the
    errors of all groups added up, where the summed sensitivity adds their squares. Groups tied
    together are one choice, whose errors are added.

    With `projected`, `M` is estimated from a finite sample, and is shrunk towards its diagonal
    first (`shrunk_pairs`); the loss of the solution is that of the shrunk matrix.

    It begins with the integer program on the diagonal and improves its optimum by exchanges.
    Within a group nothing interacts, so curvature is moved into linear terms until the function
    is as convex as it can be; then outer approximation by tangent planes in a search tree proves
    the optimum, to a relative 1e-9 (`minimise`). Limits are kept without rounding.

    Faithful to CLADO (arXiv 2307.05657), which hands the program to a commercial solver. It runs
    no network and needs no labels. Seconds for 40 groups of five candidates; the work may double
    with every few groups beyond, and a time limit then returns the best choice with its bound.

    Args:
        sensitivity: With projections.
        costs: Of the same groups and precisions; the limits already hold them.
        limits: What the choice must keep.
        ties: Groups that must take the same precision.
        solver: `cbc` or `highs`, which finds the first choice.
        time_limit: Seconds, after which the best choice found is returned.
        max_gap: Relative gap at which it may stop.
        shrinkage: Share of the interactions to take away, 0 for none; estimated if not given.

    Returns:
        The choices, with a proven bound of the quadratic loss.

    Raises:
        InfeasibleBudgetError: If no choice is within all limits.
        BudgetError: If the time limit passed before any choice was found.
        FxmpqError: If the method measures no interactions, the solver or a tie is unknown, or the
            shrinkage is not in [0, 1].

    Examples:
        >>> rows = np.array([[1.0, 0.0, -0.9, 0.0, 0.8, 0.0]])
        >>> values = {name: {"w4a8": 1.0, "w8a8": 0.0} for name in ("a", "b", "c")}
        >>> size = {name: {"w4a8": 4, "w8a8": 8} for name in values}
        >>> sensitivity = Sensitivity(values, projections=rows)
        >>> plan = quadratic(sensitivity, CostTable({"weights": size}), [Row(size, 16)])
        >>> plan.choices, round(plan.objective, 6)  # the errors of a and b cancel
        ({'a': 'w4a8', 'b': 'w4a8', 'c': 'w8a8'}, 0.01)
    """
    began, deadline = time.perf_counter(), time.monotonic() + time_limit
    check_solver(solver)
    matrix = shrunk_pairs(sensitivity, shrinkage)
    program = IntegerProgram.of(sensitivity.values, limits, ties)
    merged = _merged(matrix, sensitivity, program)
    table = _diagonal(merged, sensitivity, program)
    first = solve_program(
        table, limits, ties=ties, solver=solver, time_limit=time_limit, max_gap=max_gap
    )
    if not _interacts(merged, program.instance):
        return first
    keys = program.keys(first.choices)
    found, chosen = _search(merged, program.instance, keys, deadline, max_gap)
    choices = program.choices(chosen)
    return Solution(
        choices={group: choices[group] for group in sensitivity.values},
        objective=found.value,
        bound=found.bound,
        status="optimal" if found.bound >= found.value else "feasible",
        seconds=time.perf_counter() - began,
    )


def _merged(matrix: Floats, sensitivity: Sensitivity, program: IntegerProgram) -> Floats:
    """Interactions between the program's options: those of all their groups, added up."""
    place = {entry: index for index, entry in enumerate(sensitivity.entries)}
    members = np.zeros((len(program.entries), len(matrix)))
    for key, (groups, name) in enumerate(program.entries):
        members[key, [place[group, name] for group in groups]] = 1
    merged: Floats = members @ matrix @ members.T
    return merged


def _diagonal(
    merged: Floats, sensitivity: Sensitivity, program: IntegerProgram
) -> dict[str, dict[str, float]]:
    """The loss without interactions between options, all of it at the first group of each."""
    table = {group: dict.fromkeys(row, 0.0) for group, row in sensitivity.values.items()}
    for value, (groups, name) in zip(merged.diagonal().tolist(), program.entries, strict=True):
        table[groups[0]][name] = value
    return table


def _interacts(merged: Floats, instance: Instance) -> bool:
    across = merged.copy()
    for group in instance.groups:
        keys = [option.key for option in group]
        across[np.ix_(keys, keys)] = 0
    return bool(across.any())


def _search(
    merged: Floats, instance: Instance, first: frozenset[int], deadline: float, max_gap: float
) -> tuple[Optimum, list[int]]:
    """Minimise over the options that fit; returns the optimum and the keys it takes."""
    options = {option.key: option for option in instance.options}
    reduced = _without_dominance(instance)
    kept = {option.key: option.costs for option in reduced.options}
    settled = set(reduced.settled)
    groups = [
        [option.key for option in group if option.key in kept or option.key in settled]
        for group in instance.groups
    ]
    keys = [key for group in groups for key in group]
    nothing = (0,) * len(reduced.limits)
    shares = [
        [kept.get(key, nothing)[row] / limit for key in keys]
        for row, limit in enumerate(reduced.limits)
    ]
    costs = np.array(shares).reshape(len(reduced.limits), len(keys))
    start = np.array([keys.index(key) for group in groups for key in group if key in first])

    def is_met(chosen: Indices) -> bool:
        return instance.is_met_by([options[keys[index]] for index in chosen.tolist()])

    found = minimise(
        merged[np.ix_(keys, keys)],
        Choices(tuple(map(len, groups)), costs),
        start,
        is_met=is_met,
        deadline=deadline,
        max_gap=max_gap,
    )
    return found, [keys[index] for index in found.chosen.tolist()]


def _without_dominance(instance: Instance) -> Instance:
    """Reduce an instance that has a choice by its limits alone, whatever the options are worth.

    Two more costs, one rising and one falling within a group, keep options from dominating each
    other; their limits are never reached.
    """
    most = max(len(group) for group in instance.groups)
    groups = tuple(
        tuple(
            Option(option.key, 0, (*option.costs, place, most - place))
            for place, option in enumerate(group)
        )
        for group in instance.groups
    )
    never = most * len(groups)
    reduced = reduce_instance(Instance(groups, (*instance.limits, never, never)))
    assert reduced is not None, "the instance has a choice"
    return reduced
