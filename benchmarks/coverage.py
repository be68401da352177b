"""Which architectures fxmpq takes: each traced, quantized, planned, converted and run.

Small random configurations of transformers architectures (`_architectures.py`), each in a process
of its own. Results are kept in the cache folder: `coverage.py` alone checks those that are missing
and prints the table, `coverage.py bert resnet` checks these, `coverage.py table` prints the table
as Markdown.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import statistics
import sys
from collections import Counter
from collections.abc import Sequence

import torch
from _architectures import ARCHITECTURES
from _coverage_check import Check
from _coverage_row import Row
from _models import CACHE
from rich.console import Console
from rich.table import Table

FOLDER = CACHE / "coverage"
LIMIT_SECONDS = 900
COLUMNS = (
    "architecture",
    "weights",
    "quantizable %",
    "batch, length",
    "off",
    "16 bit dB",
    "8 bit dB",
    "plan dB",
    "ONNX Runtime plan dB",
    "reference",
    "ONNX Runtime dB",
    "trace s",
    "search s",
    "convert s",
)


def measure(name: str) -> None:
    """Check one architecture and keep its row."""
    row = Check(name, ARCHITECTURES[name]).run()
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / f"{name}.json").write_text(json.dumps(dataclasses.asdict(row), indent=1))
    print(f"{name}: {'; '.join(row.faults) or 'passes'}", flush=True)


def measure_all(names: Sequence[str]) -> None:
    """Check architectures one after the other, a process each, so that a crash stops no other."""
    # What is imported and built once is there in every process that is forked from this one.
    Check("bert", ARCHITECTURES["bert"]).run()
    context = multiprocessing.get_context("fork")
    for name in names:
        process = context.Process(target=measure, args=(name,))
        process.start()
        process.join(LIMIT_SECONDS)
        if process.exitcode is None:
            process.kill()
        if process.exitcode != 0:
            row = Row(name, errors={"process": f"ended with {process.exitcode}"})
            (FOLDER / f"{name}.json").write_text(json.dumps(dataclasses.asdict(row), indent=1))


def rows() -> list[Row]:
    """What is kept, in the catalogue's order."""
    files = [FOLDER / f"{name}.json" for name in ARCHITECTURES]
    return [Row(**json.loads(file.read_text())) for file in files if file.exists()]


def cells(row: Row) -> list[str]:
    """A row of the table."""
    if not row.weights:
        return [row.name, *[""] * (len(COLUMNS) - 1)]
    off = "exact" if row.off_db == float("inf") else f"{row.off_db:.0f} dB"
    agrees = row.agreement_db.get("reference") == float("inf")
    seconds = Counter(row.seconds)
    return [
        row.name,
        f"{row.weights:,}",
        f"{100 * row.quantizable / row.weights:.1f}",
        ", ".join(filter(None, (row.batch, row.sequence))),
        off,
        *(_db(row.uniform_db, precision) for precision in ("w16a16", "w8a8")),
        *(_db(row.plan_db, target) for target in ("reference", "onnxruntime")),
        "exact" if agrees else _db(row.agreement_db, "reference"),
        _db(row.agreement_db, "onnxruntime") + ("*" if row.amplifies else ""),
        f"{seconds['trace']:.1f}",
        f"{seconds['calibrate'] + seconds['measure'] + seconds['solve']:.1f}",
        f"{seconds['convert, onnxruntime']:.1f}",
    ]


def _db(found: dict[str, float], key: str) -> str:
    return f"{found[key]:.0f}" if key in found else ""


def summary(found: Sequence[Row]) -> list[str]:
    """Sentences about the whole table."""
    passing = [row for row in found if not row.faults]
    counted = [row for row in found if row.weights]
    shares = [row.quantizable / row.weights for row in counted]
    left = Counter[str]()
    for row in counted:
        left.update(row.left.keys())
    lines = [f"{len(passing)} of {len(found)} architectures pass every column."]
    lines.append(
        f"{100 * statistics.mean(shares):.2f} % of the weights in products and convolutions are "
        "quantizable, averaged over the architectures."
    )
    lines += [f"Left in float in {count}: {reason}." for reason, count in left.most_common()]
    lines += [f"{row.name}: {'; '.join(row.faults)}" for row in found if row.faults]
    lines += [
        f"{row.name} at {precision}: worst is {group} ({decibels:.1f} dB by itself)."
        for row in found
        for precision, (group, decibels) in row.worst.items()
    ]
    return lines


def markdown(found: Sequence[Row]) -> str:
    """The table and the sentences below it, for the docs."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    lines += [f"| {' | '.join(cells(row))} |" for row in found]
    return "\n".join([*lines, "", *(f"- {line}" for line in summary(found))])


def show(found: Sequence[Row]) -> None:
    """Print the table and the sentences in the terminal."""
    table = Table(title="Architectures")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == "architecture" else "right")
    for row in found:
        table.add_row(*cells(row))
    console = Console(width=180)
    console.print(table)
    for line in summary(found):
        console.print(line)


def main() -> None:
    """Check what is asked for or missing, and print the table."""
    torch.set_num_threads(1)
    names = sys.argv[1:]
    if names == ["table"]:
        print(markdown(rows()))
        return
    missing = [name for name in ARCHITECTURES if not (FOLDER / f"{name}.json").exists()]
    measure_all(names or missing)
    show(rows())


if __name__ == "__main__":
    main()
