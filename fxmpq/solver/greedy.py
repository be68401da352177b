"""The greedy program: flips of groups to fewer bits, the least harmful first.

Pandey et al. (AMP), arXiv 2302.05397.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from operator import add, mul, sub

from fxmpq.costs.table import CostTable
from fxmpq.errors import BudgetError, FxmpqError, closest
from fxmpq.formats import Precision
from fxmpq.sensitivity.sensitivity import Sensitivity
from fxmpq.solver.exact import exact, plain
from fxmpq.solver.forms import (
    any_choice,
    integer_program,
    integer_value,
    lower_bound,
    named_solution,
)
from fxmpq.solver.instance import Instance, Option
from fxmpq.solver.program import IntegerProgram, Row, Solution, keeping_torch_threads


@dataclass(frozen=True)
class Flip:
    """One entry of the sensitivity list: a group, or tied groups, set to another precision.

    Args:
        groups: Whose precision changes together.
        precision: Its name.
        loss: Their summed sensitivity at this precision: the harm.
        bits: Of a weight and an activation together, float counting 32.
        saving: Cost at the baseline less cost at this precision.
    """

    groups: tuple[str, ...]
    precision: str
    loss: float
    bits: int
    saving: float


def baseline(
    sensitivity: Sensitivity,
    costs: CostTable,
    metric: str,
    *,
    ties: Sequence[Sequence[str]] = (),
) -> dict[str, str]:
    """Choose where the flips start: each group's most expensive precision.

    Of equally expensive ones that of the most bits, then of the least loss.

    Args:
        sensitivity: Of every group and precision.
        costs: Of the same groups and precisions.
        metric: The cost.
        ties: Groups that take the same precision.

    Returns:
        Precision name per group.

    Raises:
        FxmpqError: If the metric or a tie is unknown, the metric is no sum over groups alone, or
            tied groups share no precision.

    Examples:
        >>> sensitivity = Sensitivity({"a": {"w4a8": 0.1, "w8a8": 0.0}})
        >>> costs = CostTable({"weights": {"a": {"w4a8": 50, "w8a8": 100}}})
        >>> baseline(sensitivity, costs, "weights")
        {'a': 'w8a8'}
    """
    program = _saving(sensitivity, costs, metric, ties)
    return program.choices([option.key for option in _starts(program, [Fraction(1)])])


def flips(
    sensitivity: Sensitivity,
    costs: CostTable,
    metric: str,
    *,
    ties: Sequence[Sequence[str]] = (),
) -> list[Flip]:
    """List every (group, precision) other than the baseline, the least harmful first.

    Sorted by rising loss, then falling bits, then falling saving, then in the order of the model:
    the sensitivity list of Pandey et al. (AMP), arXiv 2302.05397. Where the sensitivities are
    output noise, that is their order by SQNR.

    Args:
        sensitivity: Of every group and precision.
        costs: Of the same groups and precisions.
        metric: The cost to save, as `bops`.
        ties: Groups that flip together.

    Returns:
        All of them; `lowering` leaves out those that save nothing.

    Raises:
        FxmpqError: If the metric or a tie is unknown, the metric is no sum over groups alone, or
            tied groups share no precision.

    Examples:
        >>> sensitivity = Sensitivity({"a": {"w4a8": 0.1, "w8a8": 0.0, "w2a8": 0.3}})
        >>> costs = CostTable({"weights": {"a": {"w4a8": 50, "w8a8": 100, "w2a8": 25}}})
        >>> [(flip.precision, flip.saving) for flip in flips(sensitivity, costs, "weights")]
        [('w4a8', 50), ('w2a8', 75)]
    """
    program = _saving(sensitivity, costs, metric, ties)
    starts = _starts(program, [Fraction(1)])
    found = []
    for index, option in _steps(program, starts, [Fraction(1)]):
        (groups, before), (_, after) = (program.entries[o.key] for o in (starts[index], option))
        rows = [costs.costs[metric][group] for group in groups]
        saved = sum((exact(row[before]) - exact(row[after]) for row in rows), Fraction(0))
        loss = float(Fraction(option.value, program.scale))
        found.append(Flip(groups, after, loss, _bits(program, option), plain(saved)))
    return found


def lowering(found: Iterable[Flip]) -> list[Flip]:
    """Leave out the flips that do not lower their group's cost below where it is by then.

    In the published list a later, more harmful entry overwrites an earlier one of the same group
    even where it costs as much or more; this is the guard against it.

    Args:
        found: In the order they are applied.

    Examples:
        >>> both = [Flip(("a",), name, 0.1, 24, saving=128) for name in ("w8a16", "w16a8")]
        >>> [flip.precision for flip in lowering(both)]
        ['w8a16']
    """
    saved: dict[tuple[str, ...], float] = {}
    kept = []
    for flip in found:
        if flip.saving > saved.get(flip.groups, 0):
            saved[flip.groups] = flip.saving
            kept.append(flip)
    return kept


def greedy(
    sensitivity: Sensitivity,
    costs: CostTable,
    limits: Sequence[Row],
    *,
    ties: Sequence[Sequence[str]] = (),
    solver: str = "cbc",
    time_limit: float = 60.0,
    max_gap: float = 0.0,
    monotone: bool = True,
) -> Solution:
    """Flip the least harmful first until all limits are met (Pandey et al., arXiv 2302.05397).

    The walk of `flips` from the most expensive precisions on, which stops at the first flip after
    which every limit is kept. With several limits a group's cost is the sum over the limits that
    the start exceeds, each in shares of the range its total can take; a flip is applied if it
    lowers the summed excess over all limits, and the list is walked again while that helps. It
    runs no network and needs no labels; time grows with the number of flips.

    Args:
        sensitivity: Of every group and precision.
        costs: Of the same groups and precisions; the limits already hold them.
        limits: What the choice must keep.
        ties: Groups that flip together.
        solver: `cbc` or `highs`, for the bound with several limits.
        time_limit: Seconds for the bound, which is less sharp when it passes.
        max_gap: Part of the signature of every program; a walk has nothing to stop early.
        monotone: Skip flips that do not lower the excess; `False` walks the list once and lets
            each flip overwrite earlier ones, as published.

    Returns:
        The first choice on the walk that keeps all limits, with the bound of the linear
        relaxation.

    Raises:
        InfeasibleBudgetError: If no choice is within all limits.
        BudgetError: If the walk ends outside the limits though some choice is within.
        FxmpqError: If the solver or a tie is unknown, or tied groups share no precision.

    Examples:
        >>> losses = {"a": {"w4a8": 0.1, "w8a8": 0.0}, "b": {"w4a8": 0.2, "w8a8": 0.0}}
        >>> size = {"a": {"w4a8": 4, "w8a8": 8}, "b": {"w4a8": 4, "w8a8": 8}}
        >>> costs = CostTable({"weights": size})
        >>> greedy(Sensitivity(losses), costs, [Row(size, 13)]).choices
        {'a': 'w4a8', 'b': 'w8a8'}
    """
    began = time.perf_counter()
    program = integer_program(sensitivity, limits, ties, solver)
    instance = program.instance
    weights = _weights(instance)
    start = _starts(program, weights)
    over = _over(instance, instance.usage(start))
    exceeded = [weight if more else Fraction(0) for weight, more in zip(weights, over, strict=True)]
    steps = _steps(program, start, exceeded)
    with keeping_torch_threads():
        chosen = _walk(instance, start, steps, weights, monotone=monotone)
        if chosen is None:
            any_choice(instance, solver, time_limit)
            raise BudgetError(
                "the flips end outside the limits, though some choice is within; ask for "
                "program='ilp'" + ("" if monotone else ", or for monotone=True")
            )
        keys = {option.key for option in chosen}
        bound = lower_bound(instance, integer_value(program, keys), solver, time_limit)
    return named_solution(program, sensitivity, keys, bound, began)


def _saving(
    sensitivity: Sensitivity, costs: CostTable, metric: str, ties: Sequence[Sequence[str]]
) -> IntegerProgram:
    """A program whose one cost is a metric."""
    if metric not in costs.metrics:
        raise FxmpqError(f"no cost {metric!r} to save; there are {closest(metric, costs.metrics)}")
    return IntegerProgram.of(sensitivity.values, [Row(costs.separable(metric), 0)], ties)


def _bits(program: IntegerProgram, option: Option) -> int:
    return sum(Precision.parse(program.entries[option.key][1]).sort_key[:2])


def _cost(option: Option, weights: Sequence[Fraction]) -> Fraction:
    return sum(map(mul, weights, option.costs), Fraction(0))


def _starts(program: IntegerProgram, weights: Sequence[Fraction]) -> list[Option]:
    def rank(option: Option) -> tuple[Fraction, int, int]:
        return _cost(option, weights), _bits(program, option), -option.value

    return [max(group, key=rank) for group in program.instance.groups]


def _steps(
    program: IntegerProgram, starts: Sequence[Option], weights: Sequence[Fraction]
) -> list[tuple[int, Option]]:
    """Every option but the starts with the place of its group, the least harmful first."""
    found = []
    for index, (group, start) in enumerate(zip(program.instance.groups, starts, strict=True)):
        for option in group:
            if option is not start:
                added = _cost(option, weights) - _cost(start, weights)
                rank = (option.value, -_bits(program, option), added, option.key)
                found.append((rank, (index, option)))
    return [step for _, step in sorted(found)]


def _weights(instance: Instance) -> list[Fraction]:
    """Of each limit, 1 over the range that its total can take."""
    weights = []
    for row in range(len(instance.limits)):
        columns = [[option.costs[row] for option in group] for group in instance.groups]
        span = sum(max(column) - min(column) for column in columns)
        weights.append(Fraction(1, span) if span else Fraction(0))
    return weights


def _walk(
    instance: Instance,
    start: Sequence[Option],
    steps: Sequence[tuple[int, Option]],
    weights: Sequence[Fraction],
    *,
    monotone: bool,
) -> list[Option] | None:
    """Take steps in their order until all limits are kept; `None` if they never are."""
    current = list(start)
    used = instance.usage(current)
    over = _over(instance, used)
    going = True
    while going and any(over):
        going = False
        for index, option in steps:
            before = current[index]
            after = tuple(map(sub, map(add, used, option.costs), before.costs))
            left = _over(instance, after)
            if monotone and not _excess(left, weights) < _excess(over, weights):
                continue
            current[index], used, over, going = option, after, left, monotone
            if not any(over):
                break
    return None if any(over) else current


def _over(instance: Instance, used: Sequence[int]) -> list[int]:
    """By how much each limit is exceeded."""
    return [max(use - limit, 0) for use, limit in zip(used, instance.limits, strict=True)]


def _excess(over: Sequence[int], weights: Sequence[Fraction]) -> Fraction:
    return sum(map(mul, over, weights), Fraction(0))
