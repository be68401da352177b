"""The cost table: what each choice takes, as data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fxmpq.artefact import build, check_fields, dump_json, load_json
from fxmpq.costs.terms import (
    Edge,
    FormatChange,
    Moment,
    Rows,
    check_terms,
    exact_sum,
    plain_cost,
    read_terms,
    written_terms,
)
from fxmpq.errors import FxmpqError, closest
from fxmpq.formats import Precision

SCHEMA = "fxmpq.costs"
VERSION = 1


@dataclass(frozen=True)
class CostTable:
    """What every (group, precision) costs, by metric.

    A metric is a sum over groups, or a peak: the largest of several such sums. To a sum, what it
    costs to change formats between two groups may be added.

    Args:
        costs: Metric to group to precision name to cost; non-negative, and with the same
            groups and precisions for every metric. Integers stay exact.
        float_total: What the float model costs per metric: the denominator of relative
            budgets. A metric without one takes absolute budgets only.
        fixed: Cost per metric of what is in no group; 0 where it is not given.
        fingerprint: Of the model.
        edges: Metric of `costs` to what format changes between groups add to it.
        moments: Metric that is a peak, in `costs` no more, to what is alive at each moment.

    Raises:
        FxmpqError: If tables disagree, are empty, a total is for no metric, a cost is negative
            or not finite, an edge or a moment names no group or lacks a precision of one, or a
            metric is both in `costs` and a peak.

    Examples:
        >>> table = CostTable({"weights": {"conv1": {"w4a8": 50, "w8a8": 100}}})
        >>> table.smallest("weights"), table.total("weights", {"conv1": "w8a8"})
        (50, 100)
        >>> change = {"w8a8": {"w8a8": 0, "fp32": 4}, "fp32": {"w8a8": 4, "fp32": 0}}
        >>> rows = {group: {"w8a8": 10, "fp32": 30} for group in ("conv1", "conv2")}
        >>> table = CostTable({"us": rows}, edges={"us": [Edge("conv1", "conv2", change)]})
        >>> table.total("us", {"conv1": "w8a8", "conv2": "fp32"})
        44
        >>> table.format_changes("us", {"conv1": "w8a8", "conv2": "fp32"})
        (FormatChange(producer='conv1', reader='conv2', cost=4),)
    """

    costs: Mapping[str, Rows]
    float_total: Mapping[str, float] = field(default_factory=dict)
    fixed: Mapping[str, float] = field(default_factory=dict)
    fingerprint: str | None = None
    edges: Mapping[str, tuple[Edge, ...]] = field(default_factory=dict)
    moments: Mapping[str, tuple[Moment, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        tables = {
            str(metric): {
                str(group): {
                    str(Precision.parse(name)): plain_cost(
                        f"the cost {metric!r} of group {group!r} at {name}", value
                    )
                    for name, value in row.items()
                }
                for group, row in rows.items()
            }
            for metric, rows in self.costs.items()
        }
        object.__setattr__(self, "costs", tables)
        for name in ("float_total", "fixed"):
            totals = {
                str(metric): plain_cost(f"{name} of {metric!r}", value)
                for metric, value in getattr(self, name).items()
            }
            object.__setattr__(self, name, totals)
        edges = {metric: tuple(found) for metric, found in self.edges.items() if found}
        object.__setattr__(self, "edges", edges)
        moments = {metric: tuple(found) for metric, found in self.moments.items()}
        object.__setattr__(self, "moments", moments)
        self._check()
        check_terms(self.costs, self.fixed, self.edges, self.moments)

    def _check(self) -> None:
        if not self.costs or not self.groups:
            raise FxmpqError("a cost table needs at least one metric with one group")
        first, expected = next(iter(self.costs.items()))
        shape = {group: set(row) for group, row in expected.items()}
        for metric, rows in self.costs.items():
            if {group: set(row) for group, row in rows.items()} != shape:
                raise FxmpqError(
                    f"costs {metric!r} and {first!r} do not cover the same groups and precisions"
                )
            for group, row in rows.items():
                if not row:
                    raise FxmpqError(f"group {group!r} has no precision")
        for name, totals in (("float_total", self.float_total), ("fixed", self.fixed)):
            for metric in totals:
                if metric not in self.metrics:
                    raise FxmpqError(
                        f"{name} names {metric!r}, which has no costs; there are "
                        f"{closest(metric, self.metrics)}"
                    )

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics' names, those that are peaks last."""
        return (*self.costs, *self.moments)

    @property
    def groups(self) -> tuple[str, ...]:
        """The groups' names."""
        return tuple(next(iter(self.costs.values())))

    def precisions(self, group: str) -> tuple[str, ...]:
        """The precisions of a group.

        Raises:
            FxmpqError: If there is no such group, with the closest names.
        """
        return tuple(self._row(next(iter(self.costs)), group))

    def cost(self, metric: str, group: str, precision: str | Precision) -> float:
        """One entry: what a group costs by itself.

        Raises:
            FxmpqError: If there is none, as in a metric that is a peak.
        """
        row, name = self._row(metric, group), str(Precision.parse(precision))
        if name not in row:
            raise FxmpqError(f"group {group!r} has no {name}; it has {', '.join(row)}")
        return row[name]

    def separable(self, metric: str) -> Rows:
        """The entries of a metric that is nothing but their sum.

        Raises:
            FxmpqError: If there is no such metric, it has costs of format changes, or is a peak.
        """
        rows = self._rows(metric)
        if metric in self.edges:
            raise FxmpqError(
                f"{metric!r} is no sum over groups alone: {len(self.edges[metric])} edges add what "
                "format changes between groups cost; ask for program='ilp', which counts them"
            )
        return rows

    def total(self, metric: str, choices: Mapping[str, str]) -> float:
        """Cost of a choice: `fixed + sum_g cost(g, choices[g])` and what the edges add.

        For a peak it is the largest total of any moment.

        Args:
            metric: Which cost.
            choices: Precision name per group.

        Returns:
            The total, exact for integers.

        Raises:
            FxmpqError: If a metric, group or precision is not there, or a group has no choice.
        """
        self._check_metric(metric)
        missing = [group for group in self.groups if group not in choices]
        if missing:
            raise FxmpqError(f"the choices name no precision for {', '.join(missing[:5])}")
        # A peak has no rows: those of any other metric show whether the choices are legal.
        rows = metric if metric in self.costs else next(iter(self.costs))
        own = [self.cost(rows, group, choices[group]) for group in self.groups]
        if metric in self.moments:
            return max(moment.total(choices) for moment in self.moments[metric])
        between = [edge.cost(choices) for edge in self.edges.get(metric, ())]
        return exact_sum([self.fixed.get(metric, 0), *own, *between])

    def format_changes(self, metric: str, choices: Mapping[str, str]) -> tuple[FormatChange, ...]:
        """The edges that cost something under a choice, the most expensive first.

        Args:
            metric: Which cost; one without edges has no format changes.
            choices: Precision name per group.

        Raises:
            FxmpqError: As `total`.
        """
        self.total(metric, choices)
        costs = [(edge, edge.cost(choices)) for edge in self.edges.get(metric, ())]
        paid = [FormatChange(edge.producer, edge.reader, cost) for edge, cost in costs if cost]
        return tuple(sorted(paid, key=lambda change: -change.cost))

    def smallest(self, metric: str) -> float:
        """A total that no choice goes below.

        Some choice reaches it where every group has a precision that is least in every term the
        group enters, as in any metric without edges that is no peak.
        """
        return self._extreme(metric, min)

    def largest(self, metric: str) -> float:
        """A total that no choice exceeds; some choice reaches it unless the metric has edges."""
        return self._extreme(metric, max)

    def uniform(self, precision: str | Precision) -> dict[str, str]:
        """The choice closest to one precision everywhere.

        Each group takes the precision itself, else its weight-only form, else the candidate
        nearest in weight bits.

        Args:
            precision: As `w8a8`.

        Returns:
            Precision name per group.
        """
        wanted = Precision.parse(precision)
        return {group: _nearest(wanted, self.precisions(group)) for group in self.groups}

    def to_json(self, path: str | Path | None = None) -> str:
        """Write as JSON; returns the text, and writes it to `path` if given."""
        fields: dict[str, object] = {
            "fingerprint": self.fingerprint,
            "float_total": self.float_total,
            "fixed": self.fixed,
            "costs": self.costs,
            **written_terms(self.edges, self.moments),
        }
        return dump_json(SCHEMA, VERSION, fields, path)

    @classmethod
    def from_json(cls, source: str | Path) -> CostTable:
        """Read from a file or JSON text.

        Raises:
            FileFormatError: If it holds something else.
        """
        found = load_json(SCHEMA, VERSION, source)
        optional = {"float_total", "fixed", "fingerprint", "edges", "moments"}
        check_fields(SCHEMA, found, {"costs"}, optional)
        return build(SCHEMA, cls, {**found, **read_terms(SCHEMA, found)})

    def _extreme(self, metric: str, pick: Callable[[Iterable[float]], float]) -> float:
        self._check_metric(metric)
        if metric in self.moments:
            return max(
                exact_sum([moment.fixed, *(pick(row.values()) for row in moment.rows.values())])
                for moment in self.moments[metric]
            )
        own = [pick(row.values()) for row in self.costs[metric].values()]
        between = [
            pick(value for row in edge.costs.values() for value in row.values())
            for edge in self.edges.get(metric, ())
        ]
        return exact_sum([self.fixed.get(metric, 0), *own, *between])

    def _check_metric(self, metric: str) -> None:
        if metric not in self.metrics:
            raise FxmpqError(f"no cost {metric!r}; there are {closest(metric, self.metrics)}")

    def _rows(self, metric: str) -> Rows:
        self._check_metric(metric)
        if metric in self.moments:
            raise FxmpqError(
                f"{metric!r} is a peak, the largest of {len(self.moments[metric])} moments; a "
                "group has no cost of its own in it"
            )
        return self.costs[metric]

    def _row(self, metric: str, group: str) -> Mapping[str, float]:
        rows = self._rows(metric)
        if group not in rows:
            raise FxmpqError(f"no group {group!r}; closest: {closest(group, rows)}")
        return rows[group]


def _nearest(wanted: Precision, names: tuple[str, ...]) -> str:
    for exact in (wanted, wanted.weight_only):
        if str(exact) in names:
            return str(exact)
    widths = wanted.sort_key[:2]

    def distance(name: str) -> tuple[int, int]:
        found = Precision.parse(name).sort_key[:2]
        return abs(found[0] - widths[0]), abs(found[1] - widths[1])

    return min(names, key=distance)
