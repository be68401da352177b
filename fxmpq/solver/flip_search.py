"""Along the flips: the curve of cost against score, and the search for a target on it.

Pandey et al. (AMP), arXiv 2302.05397.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial

from fxmpq.costs.table import CostTable
from fxmpq.errors import FxmpqError, closest
from fxmpq.sensitivity.sensitivity import Sensitivity
from fxmpq.solver.exact import exact, plain
from fxmpq.solver.greedy import Flip, baseline, flips, lowering
from fxmpq.solver.ties import Table
from fxmpq.work import Work

# Takes a precision name per group and returns a score: higher is better.
Evaluate = Callable[[dict[str, str]], float]
# Takes a number of flips and returns the score after them.
Measure = Callable[[int], float]
_ZERO = Fraction(0)


@dataclass(frozen=True)
class FlipPoint:
    """A point of the curve.

    Args:
        count: How many flips have been applied.
        flip: The last of them; `None` at the baseline.
        cost: Total of the metric, with what is in no group.
        relative: The same as a share of the baseline's.
        loss: Predicted: the summed sensitivity.
        score: As measured; `None` where it was not.
    """

    count: int
    flip: Flip | None
    cost: float
    relative: float
    loss: float
    score: float | None = None


@dataclass(frozen=True)
class FlipSearch:
    """What a search along the flips found.

    Args:
        choices: Precision name per group.
        count: How many flips they are after; `None` if they are the `cheapest` ones.
        score: Of the choices.
        met: Whether the score reaches the target.
        scores: Every score evaluated, by number of flips, in the order of evaluation; -1 stands
            for the `cheapest` choices.
    """

    choices: dict[str, str]
    count: int | None
    score: float
    met: bool
    scores: dict[int, float]


def flipped(start: Mapping[str, str], applied: Iterable[Flip]) -> dict[str, str]:
    """Apply flips, a later one over an earlier one.

    Args:
        start: Precision name per group.
        applied: In this order.

    Examples:
        >>> flipped({"a": "w8a8", "b": "w8a8"}, [Flip(("b",), "w4a8", 0.1, 12, 50)])
        {'a': 'w8a8', 'b': 'w4a8'}
    """
    choices = dict(start)
    for flip in applied:
        choices.update(dict.fromkeys(flip.groups, flip.precision))
    return choices


def flip_curve(
    sensitivity: Sensitivity,
    costs: CostTable,
    metric: str,
    *,
    ties: Sequence[Sequence[str]] = (),
    monotone: bool = True,
    evaluate: Evaluate | None = None,
    work: Work = Work(),
) -> list[FlipPoint]:
    """Apply all flips one after the other and record cost, loss and score after each.

    The Pareto curve of Pandey et al. (AMP), arXiv 2302.05397. Without `evaluate` it runs no
    network; with it, one evaluation a point, up to `1 + sum_g (candidates_g - 1)` of them.

    Args:
        sensitivity: Of every group and precision.
        costs: Of the same groups and precisions.
        metric: The cost.
        ties: Groups that flip together.
        monotone: Whether flips that save nothing are skipped; see `greedy.lowering`.
        evaluate: Measures the score of choices.
        work: Shows progress, and keeps the scores of an interrupted run.

    Returns:
        The baseline and one point a flip.

    Raises:
        FxmpqError: If the metric or a tie is unknown, the metric is no sum over groups alone,
            tied groups share no precision, or a score is NaN.

    Examples:
        >>> sensitivity = Sensitivity({"a": {"w4a8": 0.1, "w8a8": 0.0}})
        >>> costs = CostTable({"weights": {"a": {"w4a8": 50, "w8a8": 100}}})
        >>> for point in flip_curve(sensitivity, costs, "weights"):
        ...     print(point.count, point.cost, point.relative, point.loss)
        0 100 1.0 0.0
        1 50 0.5 0.1
    """
    choices = baseline(sensitivity, costs, metric, ties=ties)
    found = flips(sensitivity, costs, metric, ties=ties)
    kept = lowering(found) if monotone else found
    table = costs.separable(metric)
    cost = sum((exact(table[group][name]) for group, name in choices.items()), _ZERO)
    first = cost = cost + exact(costs.fixed.get(metric, 0))
    loss = sum((exact(sensitivity.values[group][name]) for group, name in choices.items()), _ZERO)
    points = []
    for count, flip in enumerate(work.track([None, *kept], "flips")):
        if flip is not None:
            cost += _added(table, choices, flip)
            loss += _added(sensitivity.values, choices, flip)
            choices = flipped(choices, [flip])
        score = None
        if evaluate is not None:
            score = work.unit(f"flip {count}", partial(_evaluated, evaluate, choices))[0]
        relative = float(cost / first) if first else 1.0
        points.append(FlipPoint(count, flip, plain(cost), relative, float(loss), score))
    return points


def search_flips(
    flips: Sequence[Flip],
    evaluate: Evaluate,
    target: float,
    search: str = "binary",
    *,
    baseline: Mapping[str, str],
    monotone: bool = True,
    cheapest: Mapping[str, str] | None = None,
    work: Work = Work(),
) -> FlipSearch:
    """Find how many flips a target score allows (Pandey et al., arXiv 2302.05397).

    The scores after 0, 1, 2, ... flips are assumed not to rise: only then do the searches agree
    and find the last flip that meets the target. `brute` evaluates one after the other up to the
    first that misses it. `binary` halves the range that is left, `ceil(log2(K + 1))` evaluations
    for K flips. `interpolation` evaluates where a straight line between the ends of that range
    meets the target, and halves it where that made little headway: few evaluations on smooth
    curves, `2 log2(K) + 2` at worst. All evaluate the baseline first, and stop if it misses.

    Args:
        flips: From `greedy.flips`.
        evaluate: Measures the score of choices: accuracy, SQNR in dB, or minus a loss.
        target: The least score allowed.
        search: A key of `SEARCHES`.
        baseline: Choices that the flips start from, of `greedy.baseline`.
        monotone: Whether flips that save nothing are skipped; see `greedy.lowering`.
        cheapest: Choices, as `costs.uniform("w4a8")`, to return at once if they meet the target.
        work: Shows progress, and keeps the scores of an interrupted run.

    Returns:
        The choices after the last flip that meets the target; the baseline if none does.

    Raises:
        FxmpqError: If the search is unknown, the target or a score is NaN, or a flip is of a
            group that has no baseline.

    Examples:
        >>> found = search_flips(
        ...     [Flip(("a",), "w4a8", 0.1, 12, 50), Flip(("b",), "w4a8", 0.2, 12, 50)],
        ...     lambda choices: 0.9 - 0.1 * list(choices.values()).count("w4a8"),
        ...     target=0.75,
        ...     baseline={"a": "w8a8", "b": "w8a8"},
        ... )
        >>> found.count, found.choices
        (1, {'a': 'w4a8', 'b': 'w8a8'})
    """
    _check_search(flips, target, search, baseline)
    kept = lowering(flips) if monotone else list(flips)
    scores: dict[int, float] = {}

    def measure(count: int) -> float:
        choices = flipped(baseline, kept[:count])
        scores[count] = work.unit(f"flip {count}", partial(_evaluated, evaluate, choices))[0]
        return scores[count]

    if measure(0) < target:
        return FlipSearch(dict(baseline), 0, scores[0], met=False, scores=scores)
    if cheapest is not None:
        least = dict(cheapest)
        scores[-1] = work.unit("cheapest", partial(_evaluated, evaluate, least))[0]
        if scores[-1] >= target:
            return FlipSearch(least, None, scores[-1], met=True, scores=scores)
    count = SEARCHES[search](measure, scores[0], len(kept), target)
    found = flipped(baseline, kept[:count])
    return FlipSearch(found, count, scores[count], met=True, scores=scores)


def _check_search(
    flips: Sequence[Flip], target: float, search: str, baseline: Mapping[str, str]
) -> None:
    if search not in SEARCHES:
        raise FxmpqError(f"no search {search!r}; there are {closest(search, SEARCHES)}")
    if math.isnan(target):
        raise FxmpqError("the target score is NaN; give a number")
    lacking = [group for flip in flips for group in flip.groups if group not in baseline]
    if lacking:
        raise FxmpqError(
            f"a flip sets group {lacking[0]!r}, which the baseline lacks; closest: "
            f"{closest(lacking[0], baseline)}. Pass the baseline of the same tables"
        )


def _added(table: Table, choices: Mapping[str, str], flip: Flip) -> Fraction:
    """What a flip adds to the sum of a table's entries."""
    rows = [(table[group], choices[group]) for group in flip.groups]
    return sum((exact(row[flip.precision]) - exact(row[before]) for row, before in rows), _ZERO)


def _evaluated(evaluate: Evaluate, choices: Mapping[str, str]) -> list[float]:
    score = float(evaluate(dict(choices)))
    if math.isnan(score):
        raise FxmpqError(f"the score of the choices {dict(choices)} is NaN; it must be a number")
    return [score]


def _brute(measure: Measure, first: float, last: int, target: float) -> int:
    for count in range(1, last + 1):
        if measure(count) < target:
            return count - 1
    return last


def _binary(measure: Measure, first: float, last: int, target: float) -> int:
    meets, misses = 0, last + 1
    while misses - meets > 1:
        middle = (meets + misses) // 2
        if measure(middle) >= target:
            meets = middle
        else:
            misses = middle
    return meets


def _interpolation(measure: Measure, first: float, last: int, target: float) -> int:
    meets, misses, high = 0, last, first
    if last == 0:
        return 0
    low = measure(last)
    if low >= target:
        return last
    halve = False
    while misses - meets > 1:
        before = misses - meets
        share = 0.5 if halve or not math.isfinite(high - low) else (high - target) / (high - low)
        place = min(max(meets + math.floor(share * before), meets + 1), misses - 1)
        score = measure(place)
        if score >= target:
            meets, high = place, score
        else:
            misses, low = place, score
        halve = 2 * (misses - meets) > before
    return meets


SEARCHES: Mapping[str, Callable[[Measure, float, int, float], int]] = {
    "brute": _brute,
    "binary": _binary,
    "interpolation": _interpolation,
}
