"""Costs that the user brings: a CSV file of what was measured or simulated elsewhere."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from fxmpq.costs.table import CostTable
from fxmpq.costs.terms import Edge, exact_sum
from fxmpq.errors import FileFormatError, PrecisionError, closest
from fxmpq.formats import Precision

REST = "*"
"""In place of a group's name: what the rest of the model costs, whatever the precisions."""

BETWEEN = ">"
"""Between the producer and the reader of an edge, and between their precisions."""

_KEYS = ("group", "precision")
_FLOAT = str(Precision())


def read_costs(path: str | Path, table: CostTable) -> CostTable:
    r"""Add the metrics of a CSV file to a cost table.

    The file has the columns `group`, `precision` and one a metric, as `latency_us`, and a row for
    every group at every candidate. Rows at `fp32` may be there besides: where all groups have
    one, shares of the float model can be asked for. A row of the group `*` says what the rest of
    the model costs. `write_costs` writes a file to fill in.

    Rows of two groups, as `conv1>conv2` at `w8a8>fp32`, say what it costs that the first hands its
    result to the second in these formats; where two groups have such a row, they need one for
    every two of their candidates. A peak is no sum over groups and cannot be brought so.

    Args:
        path: The file.
        table: From `fxmpq.cost`, whose groups and precisions must all be there.

    Returns:
        The table with the file's metrics behind its own.

    Raises:
        FileFormatError: If the file cannot be read; if a column, row or number is missing, twice
            there or unknown, with its line.

    Examples:
        >>> import tempfile
        >>> table = CostTable({"weights": {"conv1": {"w4a8": 50, "w8a8": 100}}})
        >>> path = Path(tempfile.mkdtemp()) / "measured.csv"
        >>> _ = path.write_text("group,precision,us\nconv1,w4a8,3.5\nconv1,w8a8,3\n")
        >>> read_costs(path, table).cost("us", "conv1", "w4a8")
        3.5
    """
    file = _File(Path(path))
    metrics, rows = file.rows()
    known = [metric for metric in metrics if metric in table.metrics]
    if known:
        raise FileFormatError(
            f"{file.path} has costs {known[0]!r}, which the table has already; take that column out"
        )
    file.check(rows, table)
    found = {metric: file.costs(rows, index, table) for index, metric in enumerate(metrics)}
    edges = {metric: file.edges(rows, index, table) for index, metric in enumerate(metrics)}
    return replace(
        table,
        costs={**table.costs, **{metric: costs.costs for metric, costs in found.items()}},
        fixed={**table.fixed, **{metric: costs.rest for metric, costs in found.items()}},
        float_total={
            **table.float_total,
            **{m: costs.in_float for m, costs in found.items() if costs.in_float is not None},
        },
        edges={**table.edges, **edges},
    )


def write_costs(path: str | Path, table: CostTable) -> None:
    """Write a cost table as the CSV file that `read_costs` reads.

    Args:
        path: The file; replaced if it is there. Columns may be taken out and added.
        table: All its metrics are written but those that are peaks: a peak is no sum over groups.
            Several edges between the same two groups are written as one.
    """
    metrics = tuple(table.costs)
    with Path(path).open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow([*_KEYS, *metrics])
        for group in table.groups:
            for name in table.precisions(group):
                costs = [table.cost(metric, group, name) for metric in metrics]
                writer.writerow([group, name, *costs])
        writer.writerow([REST, "", *(table.fixed.get(metric, 0) for metric in metrics)])
        found = [(edge.producer, edge.reader) for edges in table.edges.values() for edge in edges]
        for ends in dict.fromkeys(found):
            for names in product(*map(table.precisions, ends)):
                costs = [_between(table, metric, ends, names) for metric in metrics]
                writer.writerow([BETWEEN.join(ends), BETWEEN.join(names), *costs])


def _between(table: CostTable, metric: str, ends: tuple[str, str], names: tuple[str, ...]) -> float:
    choices = dict(zip(ends, names, strict=True))
    edges = table.edges.get(metric, ())
    return exact_sum([e.cost(choices) for e in edges if (e.producer, e.reader) == ends])


@dataclass(frozen=True)
class _Costs:
    """One metric: costs per group and precision, of the rest, and of all in float."""

    costs: Mapping[str, Mapping[str, float]]
    rest: float
    in_float: float | None


_Rows = Mapping[tuple[str, str], tuple[int, Sequence[str]]]
"""By group and precision: the line, and the metrics' fields."""


@dataclass(frozen=True)
class _File:
    path: Path

    def rows(self) -> tuple[list[str], _Rows]:
        """The metrics' names, and every row."""
        try:
            with self.path.open(encoding="utf-8-sig", newline="") as stream:
                lines = list(csv.reader(stream))
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise FileFormatError(f"cannot read costs from {self.path}: {error}") from error
        header = [name.strip() for name in lines[0]] if lines else []
        metrics = header[len(_KEYS) :]
        if tuple(header[: len(_KEYS)]) != _KEYS or not all(metrics) or not metrics:
            raise FileFormatError(
                f"{self.path} begins with {','.join(header) or 'nothing'}; costs have the columns "
                "group,precision and one for each metric, as group,precision,latency_us"
            )
        if len(set(metrics)) < len(metrics):
            raise FileFormatError(f"{self.path} has a metric twice: {', '.join(metrics)}")
        rows: dict[tuple[str, str], tuple[int, Sequence[str]]] = {}
        for number, line in enumerate(lines[1:], 2):
            if not any(line):
                continue
            if len(line) != len(header):
                raise self.wrong(number, f"{len(line)} fields, but there are {len(header)} columns")
            key = (line[0].strip(), self._precision(number, line))
            if key in rows:
                raise self.wrong(number, f"{' '.join(key)} again, as in line {rows[key][0]}")
            rows[key] = number, line[len(_KEYS) :]
        return metrics, rows

    def check(self, rows: _Rows, table: CostTable) -> None:
        """Refuse rows that are of no group, precision or edge of a table."""
        legal = {(group, name) for group in table.groups for name in table.precisions(group)}
        legal |= {(group, _FLOAT) for group in table.groups} | {(REST, "")}
        for (group, name), (number, _) in rows.items():
            if (group, name) in legal:
                continue
            ends = _ends(group, table)
            if ends is None:
                groups = closest(group, table.groups)
                names = ", ".join(table.precisions(group)) if group in table.groups else ""
                known = f"that group has {names}" if names else f"closest groups: {groups}"
                raise self.wrong(number, f"no group and precision {group} {name}; {known}")
            if name not in map(BETWEEN.join, product(*map(table.precisions, ends))):
                has = "; ".join(f"{end} has {', '.join(table.precisions(end))}" for end in ends)
                raise self.wrong(number, f"no precisions {name} between these groups: {has}")

    def edges(self, rows: _Rows, index: int, table: CostTable) -> tuple[Edge, ...]:
        """The edges of one metric; those that cost nothing are left out."""
        named = {group: _ends(group, table) for group, _ in rows if group not in table.groups}
        found = []
        for group, ends in named.items():
            if ends is None:
                continue
            costs: dict[str, dict[str, float]] = {}
            for name, other in product(*map(table.precisions, ends)):
                key = (group, BETWEEN.join((name, other)))
                if key not in rows:
                    raise FileFormatError(f"{self.path} has no row for {group} at {key[1]}")
                costs.setdefault(name, {})[other] = self._number(*rows[key], index)
            if any(value for row in costs.values() for value in row.values()):
                found.append(Edge(*ends, costs))
        return tuple(found)

    def costs(self, rows: _Rows, index: int, table: CostTable) -> _Costs:
        """One metric for every group and precision of a table."""
        found: dict[str, dict[str, float]] = {}
        for group in table.groups:
            for name in table.precisions(group):
                if (group, name) not in rows:
                    raise FileFormatError(f"{self.path} has no row for {group} at {name}")
                found.setdefault(group, {})[name] = self._number(*rows[group, name], index)
        rest = self._number(*rows[REST, ""], index) if (REST, "") in rows else 0.0
        floats = [rows.get((group, _FLOAT)) for group in table.groups]
        parts = [self._number(*row, index) for row in floats if row is not None]
        is_known = len(parts) == len(floats)
        return _Costs(found, rest, math.fsum([rest, *parts]) if is_known else None)

    def wrong(self, number: int, what: str) -> FileFormatError:
        """An error that names the line."""
        return FileFormatError(f"{self.path}, line {number}: {what}")

    def _precision(self, number: int, line: Sequence[str]) -> str:
        if line[0].strip() == REST:
            return ""
        try:
            return BETWEEN.join(str(Precision.parse(name)) for name in line[1].split(BETWEEN))
        except PrecisionError as error:
            raise self.wrong(number, str(error)) from error

    def _number(self, number: int, fields: Sequence[str], index: int) -> float:
        try:
            value = float(fields[index])
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and value >= 0):
            what = f"{fields[index]!r} is no cost; costs are finite numbers and not negative"
            raise self.wrong(number, what)
        return value


def _ends(name: str, table: CostTable) -> tuple[str, str] | None:
    """The producer and the reader that a row is of, if it is of two groups."""
    parts = name.split(BETWEEN)
    for place in range(1, len(parts)):
        ends = BETWEEN.join(parts[:place]).strip(), BETWEEN.join(parts[place:]).strip()
        if ends[0] != ends[1] and set(ends) <= set(table.groups):
            return ends
    return None
