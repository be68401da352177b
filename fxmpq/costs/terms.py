"""What a cost has beside its groups' own entries: format changes between groups, and peaks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from numbers import Integral, Real
from typing import NamedTuple

from fxmpq.artefact import build
from fxmpq.errors import FileFormatError, FxmpqError, closest
from fxmpq.formats import Precision

Rows = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Edge:
    """What it costs that one group hands its result to another in the formats of both.

    Args:
        producer: The group that computes the value.
        reader: The group that reads it.
        costs: By the producer's precision, then by the reader's; non-negative.

    Raises:
        FxmpqError: If the producer is the reader, or a cost is negative or not finite.

    Examples:
        >>> row = {"w8a8": {"w8a8": 0, "fp32": 7}, "fp32": {"w8a8": 5, "fp32": 0}}
        >>> Edge("conv1", "conv2", row).cost({"conv1": "fp32", "conv2": "w8a8"})
        5
    """

    producer: str
    reader: str
    costs: Rows

    def __post_init__(self) -> None:
        if self.producer == self.reader:
            raise FxmpqError(
                f"an edge goes from group {self.producer!r} to itself; what a group costs by "
                "itself belongs into the table's costs"
            )
        what = f"the edge {self.producer!r} to {self.reader!r}"
        costs = {
            str(Precision.parse(name)): {
                str(Precision.parse(other)): plain_cost(f"{what} at {name} to {other}", value)
                for other, value in row.items()
            }
            for name, row in self.costs.items()
        }
        object.__setattr__(self, "costs", costs)

    def cost(self, choices: Mapping[str, str]) -> float:
        """What the edge costs under a choice for both of its groups.

        Args:
            choices: Precision name per group.
        """
        found = self.costs[str(Precision.parse(choices[self.producer]))]
        return found[str(Precision.parse(choices[self.reader]))]


@dataclass(frozen=True)
class Moment:
    """What is alive at once at one point of the computation: one candidate for the peak.

    Args:
        node: Names the point, as the node that is computed then.
        fixed: What is alive whatever the precisions; non-negative.
        rows: Group to precision to what is alive because of that group; groups that have nothing
            alive are left out.

    Raises:
        FxmpqError: If a number is negative or not finite.

    Examples:
        >>> moment = Moment("conv2", 10, {"conv1": {"w8a8": 100, "fp32": 400}})
        >>> moment.total({"conv1": "w8a8", "conv2": "fp32"})
        110
    """

    node: str
    fixed: float
    rows: Rows

    def __post_init__(self) -> None:
        what = f"the moment {self.node!r}"
        rows = {
            str(group): {
                str(Precision.parse(name)): plain_cost(f"{what} for {group!r} at {name}", value)
                for name, value in row.items()
            }
            for group, row in self.rows.items()
        }
        object.__setattr__(self, "rows", rows)
        object.__setattr__(self, "fixed", plain_cost(f"the fixed part of {what}", self.fixed))

    def total(self, choices: Mapping[str, str]) -> float:
        """What is alive under a choice: `fixed + sum_g rows[g][choices[g]]`, exact for integers.

        Args:
            choices: Precision name per group.
        """
        parts = (row[str(Precision.parse(choices[group]))] for group, row in self.rows.items())
        return exact_sum([self.fixed, *parts])


class FormatChange(NamedTuple):
    """An edge that costs something under a choice.

    Attributes:
        producer: The group that computes the value.
        reader: The group that reads it.
        cost: Of the change.
    """

    producer: str
    reader: str
    cost: float


def plain_cost(what: str, value: object) -> float:
    """Return a cost as a plain number; an integer stays one.

    Raises:
        FxmpqError: If it is no number, negative or not finite; `what` says whose.
    """
    if not isinstance(value, Real) or not math.isfinite(value) or value < 0:
        raise FxmpqError(f"{what} is {value!r}; costs are finite numbers and not negative")
    return int(value) if isinstance(value, Integral) else float(value)


def exact_sum(parts: Sequence[float]) -> float:
    """Sum numbers: an integer if all are, else rounded once."""
    exact = all(isinstance(part, int) for part in parts)
    return sum(parts) if exact else math.fsum(parts)


def check_terms(
    costs: Mapping[str, Rows],
    fixed: Mapping[str, float],
    edges: Mapping[str, Sequence[Edge]],
    moments: Mapping[str, Sequence[Moment]],
) -> None:
    """Refuse edges and moments that do not fit the groups of a table.

    Args:
        costs: Metric to group to precision to cost.
        fixed: Cost per metric of what is in no group.
        edges: By metric.
        moments: By metric.

    Raises:
        FxmpqError: If edges are for a metric without costs, a peak has costs, a fixed part or no
            moments, a group is unknown, or a precision is missing or unknown.
    """
    rows = next(iter(costs.values()))
    for metric, between in edges.items():
        if metric not in costs:
            raise FxmpqError(
                f"edges are given for {metric!r}, which has no costs of groups to add them to; "
                f"there are {closest(metric, costs)}"
            )
        check_edges(repr(metric), between, rows)
    for metric, found in moments.items():
        if metric in costs:
            raise FxmpqError(
                f"{metric!r} is both a sum of costs and a peak of moments; a metric is one of "
                "the two"
            )
        if metric in fixed:
            raise FxmpqError(
                f"fixed names {metric!r}, which is a peak; each of its moments has a fixed part "
                "of its own"
            )
        if not found:
            raise FxmpqError(f"{metric!r} has no moments; a peak needs at least one")
        for moment in found:
            what = f"the moment {moment.node!r} of {metric!r}"
            for group, row in moment.rows.items():
                _check_names(what, group, row, rows)


def check_edges(what: str, edges: Iterable[Edge], rows: Rows) -> None:
    """Refuse edges that do not fit groups.

    Args:
        what: Whose edges.
        edges: Between groups of `rows`.
        rows: Group to precisions.

    Raises:
        FxmpqError: If a group is unknown, or a precision of either end is missing or unknown.
    """
    for edge in edges:
        named = f"the edge {edge.producer!r} to {edge.reader!r} of {what}"
        _check_names(named, edge.producer, edge.costs, rows)
        for name, row in edge.costs.items():
            _check_names(f"{named} at {name}", edge.reader, row, rows)


def written_terms(
    edges: Mapping[str, Sequence[Edge]], moments: Mapping[str, Sequence[Moment]]
) -> dict[str, object]:
    """Return edges and moments as plain data for a file; what is empty is left out."""
    found = {
        "edges": {metric: list(map(asdict, terms)) for metric, terms in edges.items()},
        "moments": {metric: list(map(asdict, terms)) for metric, terms in moments.items()},
    }
    return {name: terms for name, terms in found.items() if terms}


def read_terms(schema: str, found: Mapping[str, object]) -> dict[str, object]:
    """Read edges and moments from the fields of a file that has them.

    Args:
        schema: What the file holds.
        found: Its fields.

    Returns:
        The fields `edges` and `moments`, where they are there.

    Raises:
        FileFormatError: If they are something else.
    """
    kinds: Mapping[str, Callable[..., Edge | Moment]] = {"edges": Edge, "moments": Moment}
    return {
        name: _read_lists(schema, name, kind, found[name])
        for name, kind in kinds.items()
        if name in found
    }


def _read_lists(
    schema: str, name: str, kind: Callable[..., Edge | Moment], found: object
) -> dict[str, tuple[Edge | Moment, ...]]:
    if not isinstance(found, dict):
        raise FileFormatError(f"{schema}: {name!r} must be an object of lists by metric")
    terms = {}
    for metric, entries in found.items():
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise FileFormatError(f"{schema}: {name!r} of {metric!r} must be a list of objects")
        terms[metric] = tuple(build(schema, kind, entry) for entry in entries)
    return terms


def _check_names(what: str, group: str, found: Iterable[str], rows: Rows) -> None:
    if group not in rows:
        raise FxmpqError(f"{what} names no group {group!r}; closest: {closest(group, rows)}")
    names, legal = set(found), set(rows[group])
    if names != legal:
        missing = ", ".join(sorted(legal - names)) or "none"
        unknown = ", ".join(sorted(names - legal)) or "none"
        raise FxmpqError(
            f"{what} must give a cost for every precision of {group!r}: {', '.join(rows[group])}; "
            f"missing: {missing}, unknown: {unknown}"
        )
