"""The linear program: bits relaxed to real numbers, then rounded within the limits.

Ma et al. (OMPQ), arXiv 2109.07865.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import mip

from fxmpq.costs.table import CostTable
from fxmpq.errors import BudgetError, FxmpqError, InfeasibleBudgetError, closest
from fxmpq.formats import Precision
from fxmpq.sensitivity.sensitivity import Sensitivity
from fxmpq.solver.branch import constrain, new_model
from fxmpq.solver.forms import (
    any_choice,
    integer_program,
    integer_value,
    lower_bound,
    named_solution,
)
from fxmpq.solver.instance import Instance, reduce_instance
from fxmpq.solver.lp_rounding import ROUNDINGS, Relaxed
from fxmpq.solver.program import IntegerProgram, Row, Solution, keeping_torch_threads
from fxmpq.solver.relaxation import Relaxation

# Objectives of this size leave the solver's tolerances far below what matters.
_SCALE = 1e4
# How far above the typical value others may lie before a solver fails.
_RANGE = 10**6


def lp(
    sensitivity: Sensitivity,
    costs: CostTable,
    limits: Sequence[Row],
    *,
    ties: Sequence[Sequence[str]] = (),
    solver: str = "cbc",
    time_limit: float = 60.0,
    max_gap: float = 0.0,
    rounding: str = "nearest",
) -> Solution:
    """Solve the linear relaxation, then round each group's real bits within the limits.

    The relaxation is `min sum_gc s_gc x_gc` with `sum_c x_gc = 1`, `0 <= x_gc <= 1` and all
    limits; a group's real bits are `sum_c x_gc bits_c` with the bits of weights and activations
    together, float counting 32. Candidates that another one of the group beats, or that fit no
    choice, are left out of it, and limits are rounded down to what costs can add up to. Where
    losses and costs are linear in the bits this is the program of Ma et al. (OMPQ), arXiv
    2109.07865. It runs no network and needs no labels.

    `rounding="nearest"` takes the candidate nearest to the real bits, steps down where a limit is
    exceeded, at each step for the least loss per excess removed, and then fills what room is left
    by the exchanges that gain most. `rounding="search"` tries every combination of the candidates
    just below and just above the real bits of the groups in between, and takes the one of least
    loss within the limits, and of those the one closest to the limits; where none fits it steps
    down as above. At most as many groups are in between as there are limits, of which a peak has
    one a moment.

    Args:
        sensitivity: Of every group and precision.
        costs: Of the same groups and precisions; the limits already hold them.
        limits: What the choice must keep.
        ties: Groups that must take the same precision.
        solver: `cbc` or `highs`.
        time_limit: Seconds for the linear program, and for its bound.
        max_gap: Part of the signature of every program; rounding has nothing to stop early.
        rounding: `nearest` or `search`.

    Returns:
        A choice within the limits. Its bound is the optimum of the linear program.

    Raises:
        InfeasibleBudgetError: If no choice is within all limits.
        BudgetError: If the time limit passed before the linear program was solved, or `search`
            has more than 20,000 combinations to try.
        FxmpqError: If the rounding, the solver or a tie is unknown, or tied groups share no
            precision.

    Examples:
        >>> sensitivity = Sensitivity({"a": {"w4a8": 0.1, "w8a8": 0.0}})
        >>> costs = CostTable({"weights": {"a": {"w4a8": 50, "w8a8": 100}}})
        >>> found = lp(sensitivity, costs, [Row(costs.costs["weights"], 60)])
        >>> found.choices, found.status
        ({'a': 'w4a8'}, 'optimal')
    """
    began = time.perf_counter()
    if rounding not in ROUNDINGS:
        raise FxmpqError(f"no rounding {rounding!r}; there are {closest(rounding, ROUNDINGS)}")
    program = integer_program(sensitivity, limits, ties, solver)
    with keeping_torch_threads():
        relaxed = _relax(program, solver, time_limit)
        chosen = ROUNDINGS[rounding](relaxed)
        if chosen is None:
            keys = any_choice(program.instance, solver, time_limit)
        else:
            keys = frozenset(relaxed.instance.settled).union(option.key for option in chosen)
        objective = integer_value(program, keys)
        bound = lower_bound(program.instance, objective, solver, time_limit)
    return named_solution(program, sensitivity, keys, bound, began)


def lp_shares(
    sensitivity: Sensitivity,
    limits: Sequence[Row],
    *,
    ties: Sequence[Sequence[str]] = (),
    solver: str = "cbc",
    time_limit: float = 60.0,
) -> dict[str, dict[str, float]]:
    """Return the solution of the linear relaxation that `lp` rounds, `x_gc` in [0, 1].

    Args:
        sensitivity: Of every group and precision.
        limits: What the choice must keep.
        ties: Groups that must take the same precision.
        solver: `cbc` or `highs`.
        time_limit: In seconds.

    Returns:
        Group to precision to share; each group's sum to 1.

    Raises:
        InfeasibleBudgetError: If no choice is within all limits.
        BudgetError: If the time limit passed first.
        FxmpqError: As `lp`.

    Examples:
        >>> sensitivity = Sensitivity({g: {"w4a8": 1.0, "w8a8": 0.0} for g in ("a", "b")})
        >>> size = {"a": {"w4a8": 4, "w8a8": 8}, "b": {"w4a8": 4, "w8a8": 12}}
        >>> shares = lp_shares(sensitivity, [Row(size, 16)])
        >>> {group: round(row["w8a8"], 6) for group, row in shares.items()}
        {'a': 1.0, 'b': 0.5}
    """
    program = integer_program(sensitivity, limits, ties, solver)
    with keeping_torch_threads():
        relaxed = _relax(program, solver, time_limit)
    shares = {**dict.fromkeys(relaxed.instance.settled, 1.0), **relaxed.shares}
    found: dict[str, dict[str, float]] = {group: {} for group in sensitivity.values}
    for key, (members, name) in enumerate(program.entries):
        for group in members:
            found[group][name] = shares.get(key, 0.0)
    return found


def _relax(program: IntegerProgram, solver: str, seconds: float) -> Relaxed:
    reduced = reduce_instance(program.instance)
    if reduced is None:
        raise InfeasibleBudgetError("no choice is within all limits")
    bits = {
        key: sum(Precision.parse(name).sort_key[:2])
        for key, (_, name) in enumerate(program.entries)
    }
    if not reduced.limits:
        # Nothing binds.
        best = {min(group, key=lambda option: option.value).key for group in reduced.groups}
        return Relaxed(reduced, {o.key: float(o.key in best) for o in reduced.options}, bits)
    model = new_model(solver)
    unit = _typical_value(reduced)
    columns = {
        option.key: model.add_var(obj=option.value / unit * _SCALE) for option in reduced.options
    }
    constrain(model, reduced, columns)
    # CBC prints the log of a linear program whatever it is told, but that of an integer one not.
    model.add_var(var_type=mip.BINARY)
    if seconds <= 0 or model.optimize(max_seconds=seconds) != mip.OptimizationStatus.OPTIMAL:
        raise BudgetError(
            f"{solver} did not solve the linear program in {seconds:g} s; give it a longer "
            "time_limit"
        )
    return Relaxed(reduced, {key: float(column.x) for key, column in columns.items()}, bits)


def _typical_value(instance: Instance) -> int:
    """Objective of a choice that nearly fits, but no less than a solver can tell from the rest."""
    values = [option.value for option in instance.options]
    most = max(values) or 1
    relaxation = Relaxation.of(instance, most)
    found = relaxation.cheapest(relaxation.single_price())
    total: int = sum(values[index] for index in found)
    return max(total, most // _RANGE, 1)
