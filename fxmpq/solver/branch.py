"""What python-mip is asked: the binary program of one instance, and prices on its limits."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import mip
import numpy as np
from mip import cbc

from fxmpq.errors import FxmpqError, closest
from fxmpq.solver.instance import Instance, Option
from fxmpq.solver.relaxation import Floats, Relaxation

# Named here so that CBC's library is loaded on import: the first program need not wait for it.
_CBC_MODULE = cbc
# By name: a model without one silently takes a commercial solver where it finds one.
SOLVERS: Mapping[str, str] = {"cbc": mip.CBC, "highs": mip.HIGHS}

_TOLERANCE = 1e-9
# Prices this sharp, in values of order 1, rule out as much as the sharpest.
_SHARP = 1e-6
_STEEP = 1e6
# A solver looks for improvements of about 1e-5 at least: 1e-9 of an objective scaled so.
OBJECTIVE_SCALE = 1e4
_NONE_LEFT = (mip.OptimizationStatus.INFEASIBLE, mip.OptimizationStatus.INT_INFEASIBLE)

Columns = dict[int, mip.Var]
"""The variable of each option, by its key."""


@dataclass(frozen=True)
class Cover:
    """At most `most` of some options can be chosen together.

    Args:
        keys: The options' keys.
        most: How many.
    """

    keys: frozenset[int]
    most: int


@dataclass(frozen=True)
class Branched:
    """What the solver said.

    Args:
        chosen: One option a group, within the solver's tolerance; `None` if it found none.
        complete: Whether it searched everything: `chosen` is optimal up to the gap allowed, or
            there is no solution.
        bound: Proven lower bound of the sum of values, as a share of `unit`.
    """

    chosen: tuple[Option, ...] | None
    complete: bool
    bound: float


def branch(
    instance: Instance,
    covers: Sequence[Cover],
    *,
    solver: str,
    seconds: float,
    unit: int,
    allowed_gap: float = 0.0,
) -> Branched:
    """Solve an instance by branch and cut.

    Args:
        instance: From `reduce_instance`.
        covers: Further inequalities.
        solver: A key of `SOLVERS`.
        seconds: Time limit.
        unit: Scale of the objective: the greatest sum of values that is of interest.
        allowed_gap: Absolute gap at which it may stop, as a share of `unit`.

    Returns:
        The best solution found.
    """
    if seconds <= 0:
        return Branched(None, complete=False, bound=0.0)
    model = new_model(solver)
    model.max_mip_gap_abs = allowed_gap * OBJECTIVE_SCALE
    columns = {
        option.key: model.add_var(var_type=mip.BINARY, obj=option.value / unit * OBJECTIVE_SCALE)
        for option in instance.options
    }
    constrain(model, instance, columns)
    if not add_covers(model, covers, instance, columns):
        return Branched(None, complete=True, bound=0.0)
    return optimised(model, instance, columns, seconds)


def constrain(model: mip.Model, instance: Instance, columns: Columns) -> None:
    """Add that each group takes one option, and the limits, each as a sum of shares up to 1.

    Args:
        model: Added to.
        instance: The program; no limit of it is 0.
        columns: The model's.
    """
    for group in instance.groups:
        variables = [columns[option.key] for option in group]
        model.add_constr(mip.LinExpr(variables, [1.0] * len(variables), -1.0, "="))
    for row, limit in enumerate(instance.limits):
        taking = [option for option in instance.options if option.costs[row]]
        shares = [option.costs[row] / limit for option in taking]
        model.add_constr(mip.LinExpr([columns[option.key] for option in taking], shares, -1.0, "<"))


def add_covers(
    model: mip.Model, covers: Sequence[Cover], instance: Instance, columns: Columns
) -> bool:
    """Add cover inequalities.

    Args:
        model: Added to.
        covers: Of the options of `instance` and of those it has settled.
        instance: The program.
        columns: The model's.

    Returns:
        Whether what is settled keeps all of them.
    """
    for cover in covers:
        free = [columns[key] for key in sorted(cover.keys) if key in columns]
        most = cover.most - len(cover.keys.intersection(instance.settled))
        if most < 0:
            return False
        if free:
            model.add_constr(mip.LinExpr(free, [1.0] * len(free), -float(most), "<"))
    return True


def optimised(model: mip.Model, instance: Instance, columns: Columns, seconds: float) -> Branched:
    """Solve a model.

    Args:
        model: Of the program.
        instance: The program.
        columns: The model's.
        seconds: Time limit, positive.

    Returns:
        The best solution found, within the solver's tolerance.
    """
    status = model.optimize(max_seconds=seconds)
    if status in _NONE_LEFT:
        return Branched(None, complete=True, bound=0.0)
    if model.num_solutions == 0:
        # What CBC gives as a bound then is its largest number.
        return Branched(None, complete=False, bound=0.0)
    bound = float(model.objective_bound or 0.0) / OBJECTIVE_SCALE
    chosen = tuple(
        max(group, key=lambda option: float(columns[option.key].x)) for group in instance.groups
    )
    complete = status == mip.OptimizationStatus.OPTIMAL
    return Branched(chosen, complete=complete, bound=max(bound, 0.0))


def violated_cover(instance: Instance, chosen: Sequence[Option]) -> Cover:
    """Find a cover inequality that cuts off a choice which exceeds a limit.

    The fewest of the chosen options that exceed a limit with all others at their least cannot be
    chosen together, nor can options of the same groups that take as much.

    Args:
        instance: The program.
        chosen: One option a group, in the order of the groups.

    Returns:
        The inequality.
    """
    used = instance.usage(chosen)
    row = next(row for row, limit in enumerate(instance.limits) if used[row] > limit)
    floors = [min(option.costs[row] for option in group) for group in instance.groups]
    left = instance.limits[row] - sum(floors)
    picked = sorted(
        zip(chosen, instance.groups, floors, strict=True),
        key=lambda found: found[2] - found[0].costs[row],
    )
    keys: set[int] = set()
    for most, (option, group, floor) in enumerate(picked):
        keys |= {other.key for other in group if other.costs[row] >= option.costs[row]}
        left -= option.costs[row] - floor
        if left < 0:
            return Cover(frozenset(keys), most)
    raise AssertionError("the chosen options exceed the limit")


def sharp_prices(relaxation: Relaxation, *, solver: str, seconds: float) -> Floats:
    """Find the prices of the sharpest bound, `max_u L(u)`, by cutting planes (Kelley, 1960).

    Every choice bounds `L` by a plane; the prices at which the planes found so far allow the most
    give the next choice. It ends when the bound there is as good as the planes allow.

    Args:
        relaxation: Values should be of order 1.
        solver: A key of `SOLVERS`.
        seconds: Time limit, after which the best prices so far must do.

    Returns:
        A price per limit.
    """
    deadline = time.monotonic() + seconds
    best = prices = relaxation.single_price()
    reached, allowed = relaxation.bound(prices)[0], np.inf
    seen: set[tuple[int, ...]] = set()
    model = new_model(solver)
    model.sense = mip.MAXIMIZE
    height = model.add_var(obj=1.0, lb=-_STEEP, ub=_STEEP)
    priced = [model.add_var(ub=max(_STEEP, 4 * float(price))) for price in prices]
    # CBC prints the log of a linear program whatever it is told, but that of an integer one not.
    model.add_var(var_type=mip.BINARY)
    # Not relative to the bound, which may be 0 while the planes allow a rounding error more.
    while allowed - reached > _SHARP and time.monotonic() < deadline:
        chosen = relaxation.cheapest(prices)
        if tuple(chosen) in seen:
            # The plane is there already: the rest is the solver's tolerance at steep prices.
            break
        seen.add(tuple(chosen))
        slopes = relaxation.costs[:, chosen].sum(axis=1) - 1
        level = float(relaxation.values[chosen].sum())
        coefficients = [1.0, *(-slopes).tolist()]
        model.add_constr(mip.LinExpr([height, *priced], coefficients, -level, "<"))
        left = deadline - time.monotonic()
        if model.optimize(max_seconds=max(left, 0.01)) != mip.OptimizationStatus.OPTIMAL:
            break
        allowed = float(height.x)
        prices = np.maximum(np.array([float(price.x) for price in priced]), 0.0)
        bound = relaxation.bound(prices)[0]
        if bound > reached:
            reached, best = bound, prices
    return best


def check_solver(solver: str) -> None:
    """Refuse a solver that there is none of.

    Raises:
        FxmpqError: With those there are.
    """
    if solver not in SOLVERS:
        raise FxmpqError(f"no solver {solver!r}; there are {closest(solver, SOLVERS)}")


def new_model(solver: str) -> mip.Model:
    """Make an empty, silent model that stops at nothing but the optimum.

    Args:
        solver: A key of `SOLVERS`.

    Raises:
        FxmpqError: If that solver is not installed.
    """
    try:
        model = mip.Model(solver_name=SOLVERS[solver])
    except FileNotFoundError as error:
        raise FxmpqError(
            f"the solver {solver!r} is not installed; install it with "
            "`pip install 'mip[highs]'`, or ask for solver='cbc'"
        ) from error
    model.verbose = 0
    model.threads = 1
    model.max_mip_gap = 0.0
    model.max_mip_gap_abs = 0.0
    model.infeas_tol = model.integer_tol = model.opt_tol = _TOLERANCE
    return model
