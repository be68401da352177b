"""What the forms of the program share: integers in, a choice and a proven bound out."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from fractions import Fraction

from fxmpq.errors import InfeasibleBudgetError
from fxmpq.sensitivity.sensitivity import Sensitivity
from fxmpq.solver.branch import check_solver, sharp_prices
from fxmpq.solver.instance import Instance, reduce_instance
from fxmpq.solver.program import IntegerProgram, Row, Solution, solution_of
from fxmpq.solver.relaxation import Relaxation
from fxmpq.solver.search import find_optimum

# A gap that any choice is within.
ANY_GAP = 1e300


def integer_program(
    sensitivity: Sensitivity, limits: Sequence[Row], ties: Sequence[Sequence[str]], solver: str
) -> IntegerProgram:
    """Turn a sensitivity and limits into a program in exact integers, ties merged.

    Raises:
        FxmpqError: If a limit lacks entries, the solver or a tie is unknown, or tied groups share
            no precision.
    """
    check_solver(solver)
    return IntegerProgram.of(sensitivity.values, limits, ties)


def integer_value(program: IntegerProgram, keys: Collection[int]) -> int:
    """Objective of the options with these keys, in the program's integers."""
    return sum(option.value for option in program.instance.options if option.key in keys)


def named_solution(
    program: IntegerProgram,
    sensitivity: Sensitivity,
    keys: Collection[int],
    bound: Fraction,
    began: float,
) -> Solution:
    """Name the options chosen in an integer program.

    Args:
        program: From `integer_program`.
        sensitivity: What it was made from.
        keys: Of one option a group of the program.
        bound: Proven lower bound of the objective, in the program's integers.
        began: Reading of `time.perf_counter` when the work began.

    Returns:
        The solution; `optimal` if the bound reaches the objective.
    """
    choices = program.choices(keys)
    choices = {group: choices[group] for group in sensitivity.values}
    total = math.fsum(sensitivity.values[group][name] for group, name in choices.items())
    is_reached = bound >= integer_value(program, keys)
    return solution_of(choices, total, None if is_reached else bound / program.scale, began)


def lower_bound(instance: Instance, objective: int, solver: str, seconds: float) -> Fraction:
    """Bound every choice from below by prices on the limits: the optimum of the linear program.

    Weak duality proves the bound whatever the prices; see `relaxation`.

    Args:
        instance: With a choice.
        objective: Of a choice, whose scale is that of the bound's rounding.
        solver: A key of `SOLVERS`.
        seconds: Time limit for sharp prices.

    Returns:
        The bound, not above the objective.
    """
    reduced = reduce_instance(instance)
    assert reduced is not None, "the instance has a choice"
    unit = objective - reduced.constant
    if unit <= 0 or not reduced.limits:
        return Fraction(reduced.constant)
    # Values of more than 1e308 units are no floating-point numbers.
    unit = max(unit, max(option.value for option in reduced.options) // 10**200)
    relaxation = Relaxation.of(reduced, unit)
    if len(reduced.limits) == 1:
        prices = relaxation.single_price()
    else:
        prices = sharp_prices(relaxation, solver=solver, seconds=seconds)
    share = min(max(relaxation.bound(prices)[0], 0.0), 1.0)
    bound = reduced.constant + Fraction(share) * unit
    # Values are integers: nothing lies between a bound and the next one.
    return Fraction(objective) if math.ceil(bound) >= objective else bound


def any_choice(instance: Instance, solver: str, seconds: float) -> frozenset[int]:
    """Find the keys of some choice within all limits.

    Raises:
        InfeasibleBudgetError: If there is none.
        BudgetError: If the time limit passed first.
    """
    found = find_optimum(instance, solver=solver, time_limit=seconds, max_gap=ANY_GAP)
    if found is None:
        raise InfeasibleBudgetError("no choice is within all limits")
    return found.keys
