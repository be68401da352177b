"""The 0/1 knapsack program: every group keeps its bits or drops them, under one limit.

Bablani, McKinstry, Esser, Appuswamy (EAGL and ALPS), arXiv 2301.13330.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Collection, Sequence
from fractions import Fraction
from itertools import accumulate
from typing import NamedTuple

from fxmpq.costs.table import CostTable
from fxmpq.errors import FxmpqError, InfeasibleBudgetError
from fxmpq.sensitivity.sensitivity import Sensitivity
from fxmpq.solver.forms import (
    integer_program,
    integer_value,
    named_solution,
)
from fxmpq.solver.instance import Instance, Option, reduce_instance
from fxmpq.solver.program import IntegerProgram, Row, Solution, keeping_torch_threads
from fxmpq.solver.search import find_optimum

# Lists longer than this take about a second an item and some hundred megabytes.
_MOST_STATES = 500_000


def knapsack(
    sensitivity: Sensitivity,
    costs: CostTable,
    limits: Sequence[Row],
    *,
    ties: Sequence[Sequence[str]] = (),
    solver: str = "cbc",
    time_limit: float = 60.0,
    max_gap: float = 0.0,
) -> Solution:
    """Choose which groups keep the greater of their two precisions: the 0/1 knapsack, exactly.

    With the gain `G_g = s_g(low) - s_g(high)` and the extra cost `C_g(high) - C_g(low)`, it takes
    `max sum_g G_g z_g` subject to `sum_g z_g (C_g(high) - C_g(low)) <= B - sum_g C_g(low)` over
    `z_g` in {0, 1}. Gains and costs of linked groups (`ties`) are summed.

    The dynamic program keeps, group by group, the list of choices that no other one beats in
    gain and cost (Nemhauser and Ullmann, 1969), never longer than the usual table over all
    integer costs; costs that are decimals are exact too. What cannot beat the best choice so
    far, by the gain that a fraction of one more group would bring, is dropped. If a list grows
    beyond half a million choices, branch and cut goes on.

    Faithful to Bablani et al. (EAGL and ALPS), arXiv 2301.13330. It runs no network and needs no
    labels.

    Args:
        sensitivity: Of every group, at two precisions, or one where nothing is to be chosen.
        costs: Of the same groups and precisions; the limits already hold them.
        limits: One limit.
        ties: Linked groups, which take the same precision.
        solver: `cbc` or `highs`, for when branch and cut goes on.
        time_limit: Seconds, after which the best choice found is returned.
        max_gap: Relative gap at which branch and cut may stop.

    Returns:
        The optimum.

    Raises:
        InfeasibleBudgetError: If no choice is within the limit.
        FxmpqError: If there is not exactly one limit, a group has more than two precisions, the
            solver or a tie is unknown, or tied groups share no precision.

    Examples:
        >>> sensitivity = Sensitivity({g: {"w2": s, "w4": 0} for g, s in [("a", 3.1), ("b", 2.0)]})
        >>> costs = CostTable({"bops": {group: {"w2": 20, "w4": 40} for group in "ab"}})
        >>> knapsack(sensitivity, costs, [Row(costs.costs["bops"], 60)]).choices
        {'a': 'w4', 'b': 'w2'}
    """
    began = time.perf_counter()
    program = integer_program(sensitivity, limits, ties, solver)
    _check_form(program)
    reduced = reduce_instance(program.instance)
    if reduced is None:
        raise InfeasibleBudgetError("no choice is within all limits")
    deadline = began + time_limit
    chosen, proven = _choose(reduced, deadline)
    keys: Collection[int] = {*reduced.settled, *(option.key for option in chosen)}
    value = integer_value(program, keys)
    if proven:
        return named_solution(program, sensitivity, keys, Fraction(value), began)
    with keeping_torch_threads():
        left = max(deadline - time.perf_counter(), 0.0)
        found = find_optimum(program.instance, solver=solver, time_limit=left, max_gap=max_gap)
    assert found is not None, "the reduced program has a choice"
    better = keys if value < found.objective else found.keys
    return named_solution(program, sensitivity, better, found.bound, began)


def _check_form(program: IntegerProgram) -> None:
    advice = "ask for program='ilp', which takes any number of limits and precisions"
    count = len(program.instance.limits)
    if count != 1:
        raise FxmpqError(
            f"the 0/1 knapsack has exactly one limit, and the budget {count}, counting every "
            f"moment of a peak; {advice}"
        )
    for options in program.instance.groups:
        if len(options) > 2:
            members, _ = program.entries[options[0].key]
            names = ", ".join(program.entries[option.key][1] for option in options)
            raise FxmpqError(
                f"the 0/1 knapsack chooses between two precisions, and group {members[0]!r} has "
                f"{len(options)}: {names}; prepare with two candidates, or {advice}"
            )


class _Item(NamedTuple):
    gain: int
    cost: int
    options: tuple[Option, Option]  # left, taken


# Cost, gain, and the items taken as a chain (item, the others).
_Chain = tuple[int, "_Chain"] | None
_State = tuple[int, int, _Chain]


class _Packed(NamedTuple):
    """The items of a chain, and those from `start` to before `stop`."""

    chain: _Chain
    start: int
    stop: int

    def items(self) -> set[int]:
        found = set(range(self.start, self.stop))
        chain = self.chain
        while chain is not None:
            index, chain = chain
            found.add(index)
        return found


def _choose(instance: Instance, deadline: float) -> tuple[list[Option], bool]:
    """The best option found for each group of a reduced instance, and whether it is proven."""
    if not instance.limits:
        return [min(group, key=lambda option: option.value) for group in instance.groups], True
    items = []
    for group in instance.groups:
        # Neither beats the other and both start at zero, so one is free and the other lossless.
        left, taken = sorted(group, key=lambda option: option.costs)
        items.append(_Item(left.value, taken.costs[0], (left, taken)))
    items.sort(key=lambda item: Fraction(item.gain, item.cost), reverse=True)
    packed, proven = _pack(items, instance.limits[0], deadline)
    return [item.options[index in packed] for index, item in enumerate(items)], proven


def _pack(items: Sequence[_Item], capacity: int, deadline: float) -> tuple[set[int], bool]:
    """The items of greatest gain within the capacity, and whether that is proven.

    Args:
        items: By falling gain per cost.
        capacity: Of all costs together.
        deadline: On `time.perf_counter`.
    """
    gains = [0, *accumulate(item.gain for item in items)]
    costs = [0, *accumulate(item.cost for item in items)]
    states: list[_State] = [(0, 0, None)]
    best, packed = -1, _Packed(None, 0, 0)
    for index, item in enumerate(items):
        open_states: list[tuple[int, _State]] = []
        for state in states:
            # The next items while they fit make a choice; a fraction of one more bounds them all.
            cost, gain, chain = state
            room = capacity - cost + costs[index]
            stop = bisect_right(costs, room) - 1
            reached = gain + gains[stop] - gains[index]
            if reached > best:
                best, packed = reached, _Packed(chain, index, stop)
            if stop < len(items):
                following = items[stop]
                reached += following.gain * (room - costs[stop]) // following.cost
            open_states.append((reached, state))
        left = [state for most, state in open_states if most > best]
        if left and (len(left) > _MOST_STATES or time.perf_counter() > deadline):
            return packed.items(), False
        taken = [
            (cost + item.cost, gain + item.gain, (index, chain))
            for cost, gain, chain in left
            if cost + item.cost <= capacity
        ]
        states = _undominated(left, taken)
    return packed.items(), True


def _undominated(left: Sequence[_State], taken: Sequence[_State]) -> list[_State]:
    """Of two lists by rising cost and gain, the states that no other one beats, so sorted."""
    kept: list[_State] = []
    most = -1
    # Two sorted runs: sorting merges them.
    for state in sorted([*left, *taken], key=lambda state: (state[0], -state[1])):
        if state[1] > most:
            kept.append(state)
            most = state[1]
    return kept
