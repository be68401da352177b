"""What python-mip is asked for a program with pairs: its linear form."""

from __future__ import annotations

from collections.abc import Sequence

import mip

from fxmpq.solver.branch import (
    OBJECTIVE_SCALE,
    Branched,
    Columns,
    Cover,
    add_covers,
    new_model,
    optimised,
)
from fxmpq.solver.pairs import Pair, PairedInstance, classes

# Of a limit: what takes less counts as nothing.
_LEAST_SHARE = 1e-6

# What a sum consists of: coefficients and their variables.
_Sum = tuple[list[float], list[mip.Var]]


def branch_pairs(
    paired: PairedInstance,
    covers: Sequence[Cover],
    *,
    solver: str,
    seconds: float,
    unit: int,
    gap: float = 0.0,
) -> Branched:
    """Solve a program with pairs by branch and cut.

    For a pair of groups `u` and `v`, options that the pair treats alike are a class. Every two
    classes get a variable `y[a, b] >= 0`, 1 where both are chosen, with the marginals of the
    choice:

        sum_b y[a, b] = sum of x[u, p] over p in a,   sum_a y[a, b] = sum of x[v, q] over q in b.

    That is exact where `x` is binary, so `y` need not be, and its linear relaxation is as sharp
    as any for a single pair (Schlesinger, 1976).

    Args:
        paired: From `pair_reduction.reduce_pairs`.
        covers: Further inequalities.
        solver: A key of `SOLVERS`.
        seconds: Time limit.
        unit: Scale of the objective: the greatest sum of values that is of interest.
        gap: Relative gap at which it may stop.

    Returns:
        The best solution found; its sums may exceed limits by the solver's tolerance, and by
        what takes less than a millionth of a limit.
    """
    if seconds <= 0:
        return Branched(None, complete=False, bound=0.0)
    instance = paired.instance
    model = new_model(solver)
    model.max_mip_gap = gap
    columns: Columns = {
        option.key: model.add_var(var_type=mip.BINARY, obj=option.value / unit * OBJECTIVE_SCALE)
        for option in instance.options
    }
    for group in instance.groups:
        _constrain(model, ([1.0] * len(group), [columns[option.key] for option in group]), 1.0)
    sums: list[_Sum] = [([], []) for _ in instance.limits]
    for row, limit in enumerate(instance.limits):
        for option in instance.options:
            _add(sums[row], option.costs[row], limit, columns[option.key])
    for pair in paired.pairs:
        _add_pair(model, columns, paired, pair, sums, unit)
    for found in sums:
        _constrain(model, found, 1.0, "<")
    if not add_covers(model, covers, instance, columns):
        return Branched(None, complete=True, bound=0.0)
    return optimised(model, instance, columns, seconds)


def _add_pair(
    model: mip.Model,
    columns: Columns,
    paired: PairedInstance,
    pair: Pair,
    sums: Sequence[_Sum],
    unit: int,
) -> None:
    """Add the variables of a pair, their marginals, and what they take."""
    left, right = (
        classes(place, paired.instance.groups[place], pair) for place in (pair.left, pair.right)
    )
    table: list[list[mip.Var]] = []
    for keys in left:
        table.append([])
        for others in right:
            value, *costs = pair.entries[keys[0], others[0]]
            limits = paired.instance.limits
            # What no limit has room for is left at zero.
            most = 1.0 if all(map(int.__le__, costs, limits)) else 0.0
            variable = model.add_var(obj=value / unit * OBJECTIVE_SCALE if most else 0.0, ub=most)
            table[-1].append(variable)
            for found, cost, limit in zip(sums, costs, limits, strict=True):
                if most:
                    _add(found, cost, limit, variable)
    for keys, variables in zip(left, table, strict=True):
        _marginal(model, variables, [columns[key] for key in keys])
    for keys, variables in zip(right, map(list, zip(*table, strict=True)), strict=True):
        _marginal(model, variables, [columns[key] for key in keys])


def _marginal(model: mip.Model, parts: list[mip.Var], whole: list[mip.Var]) -> None:
    signs = [1.0] * len(parts) + [-1.0] * len(whole)
    _constrain(model, (signs, [*parts, *whole]), 0.0)


def _add(found: _Sum, cost: int, limit: int, variable: mip.Var) -> None:
    # Less than that leads CBC to wrong optima; what then exceeds a limit is cut off by covers.
    if cost > limit * _LEAST_SHARE:
        found[0].append(cost / limit)
        found[1].append(variable)


def _constrain(model: mip.Model, found: _Sum, limit: float, sense: str = "=") -> None:
    coefficients, variables = found
    model.add_constr(mip.LinExpr(variables, coefficients, -limit, sense))
