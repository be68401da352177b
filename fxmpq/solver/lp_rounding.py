"""From the shares of a linear program to one precision a group, within the limits."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import product

from fxmpq.errors import BudgetError
from fxmpq.solver.instance import Instance, Option
from fxmpq.solver.relaxation import improved

# Shares this close to 0 or 1 are the solver's rounding.
_ROUNDING = 1e-6
# A limit on a peak is one a moment, and that many groups may lie between two candidates.
_MOST_COMBINATIONS = 20_000


@dataclass(frozen=True)
class Relaxed:
    """A solved linear program.

    Args:
        instance: The program.
        shares: By the key of an option, in [0, 1]; those of a group sum to 1.
        bits: By the key of an option, of weights and activations together.
    """

    instance: Instance
    shares: Mapping[int, float]
    bits: Mapping[int, int]

    def whole(self, group: Sequence[Option]) -> Option | None:
        """The option that has all of its group, if one has."""
        most = max(group, key=lambda option: self.shares[option.key])
        return most if self.shares[most.key] >= 1 - _ROUNDING else None

    def real_bits(self, group: Sequence[Option]) -> float:
        """`sum_c x_c bits_c`."""
        return sum(self.shares[option.key] * self.bits[option.key] for option in group)

    def nearest(self, group: Sequence[Option]) -> Option:
        """The option nearest to the real bits; of equal ones that of the greatest share."""
        real = self.real_bits(group)

        def distance(option: Option) -> tuple[float, float, int]:
            return abs(self.bits[option.key] - real), -self.shares[option.key], option.value

        return min(group, key=distance)

    def around(self, group: Sequence[Option]) -> list[Option]:
        """The options of the most bits below the real ones, and of the fewest above."""
        real = self.real_bits(group)
        bits = [self.bits[option.key] for option in group]
        below = max((found for found in bits if found <= real + _ROUNDING), default=None)
        above = min((found for found in bits if found >= real - _ROUNDING), default=None)
        return [option for option in group if self.bits[option.key] in (below, above)]


def _round_to_nearest(relaxed: Relaxed) -> list[Option] | None:
    groups = relaxed.instance.groups
    chosen = [relaxed.whole(group) or relaxed.nearest(group) for group in groups]
    fitting = _stepped_down(relaxed.instance, chosen)
    return None if fitting is None else improved(relaxed.instance, fitting)


def _search_around(relaxed: Relaxed) -> list[Option] | None:
    instance = relaxed.instance
    found = [relaxed.whole(group) for group in instance.groups]
    options = [
        relaxed.around(group) if whole is None else [whole]
        for group, whole in zip(instance.groups, found, strict=True)
    ]

    count = math.prod(map(len, options))
    if count > _MOST_COMBINATIONS:
        raise BudgetError(
            f"rounding='search' would try {count:,} combinations, since {found.count(None)} groups "
            "lie between two candidates; ask for rounding='nearest', or for program='ilp'"
        )

    def rank(chosen: Sequence[Option]) -> tuple[int, Fraction]:
        used = zip(instance.usage(chosen), instance.limits, strict=True)
        left = sum((1 - Fraction(cost, limit) for cost, limit in used), Fraction(0))
        return sum(option.value for option in chosen), left

    combinations = [list(chosen) for chosen in product(*options)]
    fitting = [chosen for chosen in combinations if instance.is_met_by(chosen)]
    if fitting:
        return min(fitting, key=rank)
    return _stepped_down(instance, min(combinations, key=rank))


def _stepped_down(instance: Instance, chosen: Sequence[Option]) -> list[Option] | None:
    """Change options one by one until all limits are kept, the least loss per excess removed first.

    Returns:
        The choice, or `None` if no single change removes any more excess.
    """
    current = list(chosen)
    while not instance.is_met_by(current):
        used = instance.usage(current)
        excess = _excess(used, instance.limits)
        steps = []
        for index, group in enumerate(instance.groups):
            before = current[index]
            for option in group:
                after = [
                    use + new - old
                    for use, new, old in zip(used, option.costs, before.costs, strict=True)
                ]
                removed = excess - _excess(after, instance.limits)
                if removed > 0:
                    steps.append(((option.value - before.value) / removed, index, option))
        if not steps:
            return None
        _, index, option = min(steps)
        current[index] = option
    return current


def _excess(used: Sequence[int], limits: Sequence[int]) -> Fraction:
    """By how much limits are exceeded, in shares of each."""
    over = (
        Fraction(use - limit, limit) for use, limit in zip(used, limits, strict=True) if use > limit
    )
    return sum(over, Fraction(0))


ROUNDINGS: Mapping[str, Callable[[Relaxed], list[Option] | None]] = {
    "nearest": _round_to_nearest,
    "search": _search_around,
}
"""By name; each returns `None` where it finds no choice within the limits.

`search` raises `BudgetError` where it would have more than 20,000 combinations to try.
"""
