"""Indicators: learned steps added up to scores, and what guards their order in bits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

from fxmpq.formats import NumberFormat
from fxmpq.graph.state import Group

GUARDS = ("monotone", "forbid")

Indicators = Mapping[str, Mapping[NumberFormat, float]]
"""Learned step per module name of a quantizer and format."""


def indicator_scores(
    groups: Sequence[Group], steps: Indicators, *, alpha: float, guard: str
) -> dict[str, dict[str, float]]:
    """Add learned steps up to the score of every (group, precision).

    The score of `w<b>a<c>` is the sum of the steps at `c` bits of the group's activations, plus
    `alpha` times the sum of the steps at `b` bits of its layers' weights. A step smaller than
    that of the next wider width is raised to it (`monotone`), or its entries are forbidden
    (`forbid`): these score twice the sum of all others, so that a solver takes them only where
    the budget leaves no other choice (LIMPQ, Tang et al. 2022, arXiv:2203.08368).

    Args:
        groups: Of the graph.
        steps: Learned step per quantizer's module name and format.
        alpha: Weight of the weights' steps.
        guard: `monotone` or `forbid`.

    Returns:
        Group to precision name to score; 0 for `fp32`.

    Examples:
        >>> from fxmpq.formats import Precision
        >>> from fxmpq.graph.state import Layer
        >>> layer = Layer("fc", "linear", "fc", "fc.weight", 8, (2, 4), 0, weight_quantizer="q")
        >>> group = Group("fc", (layer,), (Precision(2), Precision(4)))
        >>> steps = {"q": {NumberFormat(2): 0.5, NumberFormat(4): 0.125}}
        >>> indicator_scores([group], steps, alpha=2.0, guard="monotone")
        {'fc': {'w2': 1.0, 'w4': 0.25}}
    """
    is_forbidding = guard == "forbid"
    counted = steps if is_forbidding else {name: _never_falling(r) for name, r in steps.items()}
    forbidden = {
        (name, entry)
        for name, row in steps.items()
        for wide, entry in _neighbours(row)
        if is_forbidding and row[entry] < row[wide]
    }
    values: dict[str, dict[str, float]] = {}
    refused: list[tuple[str, str]] = []
    for group in groups:
        values[group.name] = {}
        for candidate in group.candidates:
            parts = [(name, candidate.activation, 1.0) for name in group.activation_quantizers]
            parts += [
                (layer.weight_quantizer, candidate.weight, alpha)
                for layer in group.layers
                if layer.weight_quantizer is not None
            ]
            used = [(name, entry, factor) for name, entry, factor in parts if entry is not None]
            if any((name, entry) in forbidden for name, entry, _ in used):
                refused.append((group.name, str(candidate)))
            score = sum(factor * counted[name][entry] for name, entry, factor in used)
            values[group.name][str(candidate)] = float(score)
    for group_name, candidate_name in refused:
        values[group_name][candidate_name] = 0.0
    # More than any plan without them, yet finite: no budget becomes impossible to meet.
    penalty = 2 * sum(value for row in values.values() for value in row.values()) or 1.0
    for group_name, candidate_name in refused:
        values[group_name][candidate_name] = penalty
    return values


def _neighbours(row: Mapping[NumberFormat, float]) -> Iterator[tuple[NumberFormat, NumberFormat]]:
    """Every format with the next narrower one."""
    falling = sorted(row, key=lambda entry: entry.bits, reverse=True)
    yield from pairwise(falling)


def _never_falling(row: Mapping[NumberFormat, float]) -> dict[NumberFormat, float]:
    """Steps with each at least that of the next wider width."""
    raised = dict(row)
    for wide, narrow in _neighbours(row):
        raised[narrow] = max(raised[narrow], raised[wide])
    return raised
