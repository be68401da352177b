"""The nearest choice that keeps the limits: what to begin with when the limits have moved."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fxmpq.solver.instance import Instance, Option
from fxmpq.solver.relaxation import Floats

# Beyond this many options only single exchanges are tried: there are as many pairs as its square.
_PAIRED = 1_000


def exchanged(instance: Instance, chosen: Sequence[Option]) -> list[Option] | None:
    """Find the choice of least value within all limits that differs in two groups at most.

    Sums are compared in floating point, and the choice found is checked without rounding.

    Args:
        instance: The program.
        chosen: One option a group, in the order of the groups; it need not keep the limits.

    Returns:
        The choice, or `None` if none of these keeps all limits.
    """
    options = instance.options
    place = np.repeat(np.arange(len(chosen)), [len(group) for group in instance.groups])
    before = [chosen[index] for index in place.tolist()]
    pairs = list(zip(options, before, strict=True))
    values = _shares([new.value - old.value for new, old in pairs])
    costs, room = [], []
    for row, used in enumerate(instance.usage(chosen)):
        added = [new.costs[row] - old.costs[row] for new, old in pairs]
        *shares, left = _shares([*added, instance.limits[row] - used])
        costs.append(np.array(shares))
        room.append(left)
    if len(options) > _PAIRED:
        fits = np.all([cost <= most for cost, most in zip(costs, room, strict=True)], axis=0)
        single = int(np.where(fits, values, np.inf).argmin())
        picked = (single, single)
    else:
        stays = np.array([new is old for new, old in pairs])
        # One option of a group, and no other than the present one with it.
        fits = (place[:, None] != place) | stays | stays[:, None]
        for cost, most in zip(costs, room, strict=True):
            fits &= cost[:, None] + cost <= most
        total = np.where(fits, values[:, None] + values, np.inf)
        picked = divmod(int(total.argmin()), len(options))
    found = list(chosen)
    for index in picked:
        if options[index] is not before[index]:
            found[int(place[index])] = options[index]
    return found if instance.is_met_by(found) else None


def _shares(numbers: Sequence[int]) -> Floats:
    """Numbers of any size as shares of the greatest."""
    scale = max(1, *map(abs, numbers))
    return np.array([number / scale for number in numbers])
