"""Costs that the user brings: a CSV file of what was measured or simulated elsewhere."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fxmpq.costs.table import CostTable
from fxmpq.errors import FileFormatError, PrecisionError, closest
from fxmpq.formats import Precision

REST = "*"
"""In place of a group's name: what the rest of the model costs, whatever the precisions."""

_KEYS = ("group", "precision")
_FLOAT = str(Precision())


def read_costs(path: str | Path, table: CostTable) -> CostTable:
    r"""Add the metrics of a CSV file to a cost table.

    The file has the columns `group`, `precision` and one a metric, as `latency_us`, and a row for
    every group at every candidate. Rows at `fp32` may be there besides: where all groups have
    one, shares of the float model can be asked for. A row of the group `*` says what the rest of
    the model costs. `write_costs` writes a file to fill in.

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
    found = {metric: file.costs(rows, index, table) for index, metric in enumerate(metrics)}
    return replace(
        table,
        costs={**table.costs, **{metric: costs.costs for metric, costs in found.items()}},
        fixed={**table.fixed, **{metric: costs.rest for metric, costs in found.items()}},
        float_total={
            **table.float_total,
            **{m: costs.in_float for m, costs in found.items() if costs.in_float is not None},
        },
    )


def write_costs(path: str | Path, table: CostTable) -> None:
    """Write a cost table as the CSV file that `read_costs` reads.

    Args:
        path: The file; replaced if it is there. Columns may be taken out and added.
        table: All its metrics are written.
    """
    metrics = table.metrics
    with Path(path).open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow([*_KEYS, *metrics])
        for group in table.groups:
            for name in table.precisions(group):
                costs = [table.cost(metric, group, name) for metric in metrics]
                writer.writerow([group, name, *costs])
        writer.writerow([REST, "", *(table.fixed.get(metric, 0) for metric in metrics)])


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

    def costs(self, rows: _Rows, index: int, table: CostTable) -> _Costs:
        """One metric for every group and precision of a table."""
        legal = {(group, name) for group in table.groups for name in table.precisions(group)}
        legal |= {(group, _FLOAT) for group in table.groups} | {(REST, "")}
        for key, (number, _) in rows.items():
            if key not in legal:
                groups = closest(key[0], table.groups)
                names = ", ".join(table.precisions(key[0])) if key[0] in table.groups else ""
                known = f"that group has {names}" if names else f"closest groups: {groups}"
                raise self.wrong(number, f"no group and precision {' '.join(key)}; {known}")
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
            return str(Precision.parse(line[1]))
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
