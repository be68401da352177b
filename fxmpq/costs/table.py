"""The cost table: what each choice takes, as data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from pathlib import Path

from fxmpq.artefact import build, check_fields, dump_json, load_json
from fxmpq.errors import FxmpqError, closest
from fxmpq.formats import Precision

SCHEMA = "fxmpq.costs"
VERSION = 1

Rows = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class CostTable:
    """What every (group, precision) costs, by metric.

    Args:
        costs: Metric to group to precision name to cost; non-negative, and with the same
            groups and precisions for every metric. Integers stay exact.
        float_total: What the float model costs per metric: the denominator of relative
            budgets. A metric without one takes absolute budgets only.
        fixed: Cost per metric of what is in no group; 0 where it is not given.
        fingerprint: Of the model.

    Raises:
        FxmpqError: If tables disagree, are empty, a total is for no metric, or a cost is
            negative or not finite.

    Examples:
        >>> table = CostTable({"weights": {"conv1": {"w4a8": 50, "w8a8": 100}}})
        >>> table.smallest("weights"), table.total("weights", {"conv1": "w8a8"})
        (50, 100)
    """

    costs: Mapping[str, Rows]
    float_total: Mapping[str, float] = field(default_factory=dict)
    fixed: Mapping[str, float] = field(default_factory=dict)
    fingerprint: str | None = None

    def __post_init__(self) -> None:
        tables = {
            str(metric): {
                str(group): {
                    str(Precision.parse(name)): _cost(
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
                str(metric): _cost(f"{name} of {metric!r}", value)
                for metric, value in getattr(self, name).items()
            }
            object.__setattr__(self, name, totals)
        self._check()

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
                if metric not in self.costs:
                    raise FxmpqError(
                        f"{name} names {metric!r}, which has no costs; there are "
                        f"{closest(metric, self.costs)}"
                    )

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics' names."""
        return tuple(self.costs)

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
        """One entry."""
        row, name = self._row(metric, group), str(Precision.parse(precision))
        if name not in row:
            raise FxmpqError(f"group {group!r} has no {name}; it has {', '.join(row)}")
        return row[name]

    def total(self, metric: str, choices: Mapping[str, str]) -> float:
        """Cost of a choice for every group: `fixed + sum_g cost(g, choices[g])`.

        Args:
            metric: Which cost.
            choices: Precision name per group.

        Returns:
            The total, exact for integers.

        Raises:
            FxmpqError: If a metric, group or precision is not there, or a group has no choice.
        """
        found = self._metric(metric)
        missing = [group for group in found if group not in choices]
        if missing:
            raise FxmpqError(f"the choices name no precision for {', '.join(missing[:5])}")
        return self._sum(metric, [self.cost(metric, group, choices[group]) for group in found])

    def smallest(self, metric: str) -> float:
        """The least total that any choice reaches."""
        rows = self._metric(metric).values()
        return self._sum(metric, [min(row.values()) for row in rows])

    def largest(self, metric: str) -> float:
        """The greatest total that any choice reaches."""
        rows = self._metric(metric).values()
        return self._sum(metric, [max(row.values()) for row in rows])

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
        fields = {
            "fingerprint": self.fingerprint,
            "float_total": self.float_total,
            "fixed": self.fixed,
            "costs": self.costs,
        }
        return dump_json(SCHEMA, VERSION, fields, path)

    @classmethod
    def from_json(cls, source: str | Path) -> CostTable:
        """Read from a file or JSON text.

        Raises:
            FileFormatError: If it holds something else.
        """
        found = load_json(SCHEMA, VERSION, source)
        check_fields(SCHEMA, found, {"costs"}, {"float_total", "fixed", "fingerprint"})
        return build(SCHEMA, cls, found)

    def _sum(self, metric: str, parts: list[float]) -> float:
        parts = [self.fixed.get(metric, 0), *parts]
        exact = all(isinstance(part, int) for part in parts)
        return sum(parts) if exact else math.fsum(parts)

    def _metric(self, metric: str) -> Rows:
        if metric not in self.costs:
            raise FxmpqError(f"no cost {metric!r}; there are {closest(metric, self.costs)}")
        return self.costs[metric]

    def _row(self, metric: str, group: str) -> Mapping[str, float]:
        rows = self._metric(metric)
        if group not in rows:
            raise FxmpqError(f"no group {group!r}; closest: {closest(group, rows)}")
        return rows[group]


def _cost(what: str, value: object) -> float:
    """The value as a plain number; an integer stays one."""
    if not isinstance(value, Real) or not math.isfinite(value) or value < 0:
        raise FxmpqError(f"{what} is {value!r}; costs are finite numbers and not negative")
    return int(value) if isinstance(value, Integral) else float(value)


def _nearest(wanted: Precision, names: tuple[str, ...]) -> str:
    for exact in (wanted, wanted.weight_only):
        if str(exact) in names:
            return str(exact)
    widths = wanted.sort_key[:2]

    def distance(name: str) -> tuple[int, int]:
        found = Precision.parse(name).sort_key[:2]
        return abs(found[0] - widths[0]), abs(found[1] - widths[1])

    return min(names, key=distance)
