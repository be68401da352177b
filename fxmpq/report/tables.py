"""The tables of a report for the terminal."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fxmpq.report.compare import FLOAT, MIXED
from fxmpq.report.metrics import METRICS
from fxmpq.report.refinements import WHOLE_MODEL, refinement_grid, refinement_rows_text
from fxmpq.report.report import Report
from fxmpq.report.sizes import fixed_size_lines
from fxmpq.wording import counted, decibels, in_unit, percent, shortened

_COLUMNS = ("SQNR", "weights", "share", "BOPs", "share", "latency")
"""Headings of the comparison behind the score and its difference; `share` is of float."""
_OTHER_COLUMNS = 59  # what the other columns take
_REFINED_NAME = 32


def layer_table(report: Report, name_length: int = 80) -> Table:
    """A row a layer: chosen precision, sensitivity, size, bit operations, kernel.

    Sensitivity is the output SQNR with only that layer's group quantized; layers that share a
    group show it once, and methods that measure no noise power leave it out. Why a kernel is not
    what was asked stands below the table, once a reason.

    Args:
        report: From `build_report`.
        name_length: Longer names have the first parts of their path cut to a letter.

    Returns:
        A Rich table.
    """
    reasons = dict.fromkeys(row.reason for row in report.layers if row.reason)
    numbers = {reason: number for number, reason in enumerate(reasons, start=1)}
    title = f"Layers at {report.budget} on {report.target}"
    table = _narrow_table(title)
    table.add_column("layer", overflow="fold")
    table.add_column("chosen")
    for heading in ("alone", "weights", "BOPs"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("kernel", overflow="fold", min_width=20)
    for row in report.layers:
        quantized = row.precision != "fp32"
        known = decibels(row.alone_db) if quantized and report.is_predicting else ""
        alone = "shared" if row.is_shared else known
        table.add_row(
            escape(shortened(row.layer, name_length)),
            row.precision,
            alone,
            counted(row.weight_bytes, "B"),
            counted(row.bops),
            escape(f"{row.kernel} ({numbers[row.reason]})" if row.reason else row.kernel),
        )
    if numbers:
        noted = (f"({number}) {reason}" for reason, number in numbers.items())
        table.caption = escape("\n".join(noted))
        table.caption_justify = "left"
    return table


def refinement_table(report: Report, name_length: int = 80) -> Table:
    """A row a layer, a column a refinement method: its output's SQNR afterwards, and the gain.

    Args:
        report: With refinements.
        name_length: Longer names have the first parts of their path cut to a letter.

    Returns:
        A Rich table.
    """
    grid = refinement_grid(report.refinements, [row.layer for row in report.layers])
    table = _narrow_table("Refinement: SQNR in dB, gain")
    table.add_column("layer", overflow="fold")
    for method in grid.methods:
        table.add_column(method, justify="right")
    for layer, cells in refinement_rows_text(grid).items():
        found = [" ".join(cell) for cell in cells]
        style = "bold" if layer == WHOLE_MODEL else ""
        table.add_row(escape(shortened(layer, name_length)), *found, style=style)
    return table


def comparison_table(report: Report) -> Table:
    """A row a model: its score, SQNR, weight size, bit operations and latency.

    Args:
        report: From `build_report`.

    Returns:
        A Rich table.
    """
    table = _narrow_table(
        f"On {report.test_samples:,} test samples, all running on {report.measured_on}"
    )
    table.add_column("model")
    for heading in (METRICS[report.metric].short, *comparison_columns(report)[1:]):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, cells in comparison_rows(report).items():
        table.add_row(name, *cells, style="bold" if name == MIXED else "")
    return table


def comparison_columns(report: Report) -> tuple[str, ...]:
    """The comparison's headings, but for the model's."""
    metric = METRICS[report.metric]
    return (metric.name, metric.heading, *_COLUMNS)


def comparison_rows(report: Report) -> dict[str, tuple[str, ...]]:
    """The comparison's cells as text, by model; sizes and scores also against float.

    Args:
        report: With an entry `float`.

    Returns:
        Per entry, the cells under `comparison_columns`.
    """
    base, metric = report.entries[FLOAT], METRICS[report.metric]
    return {
        name: (
            metric.text(entry.score, 2),
            "" if name == FLOAT else metric.difference(entry.score, base.score),
            decibels(entry.sqnr_db),
            counted(entry.weight_bytes, "B"),
            percent(entry.weight_bytes / base.weight_bytes),
            counted(entry.bops),
            percent(entry.bops / base.bops) if base.bops else "",
            f"{entry.latency_ms:.2f} ms",
        )
        for name, entry in report.entries.items()
    }


def own_cost_lines(report: Report) -> list[str]:
    """What the models cost in metrics that not every target has, a line each, also against float.

    Args:
        report: With entries `float` and `mixed`.
    """
    in_float = report.entries[FLOAT].costs
    lines = []
    for metric in report.entries[MIXED].costs:
        parts = []
        for name, entry in report.entries.items():
            if metric in entry.costs:
                is_share = name != FLOAT and in_float.get(metric)
                share = f" ({percent(entry.costs[metric] / in_float[metric])})" if is_share else ""
                shown = in_unit(entry.costs[metric], report.cost_units.get(metric, ""))
                parts.append(f"{name} {shown}{share}")
        lines.append(f"{metric} by the cost table: {', '.join(parts)}")
    return lines


def print_tables(report: Report, console: Console) -> None:
    """Print the layers, what refinement did to them if it was done, then the comparison.

    What the models cost in metrics that not every target has follows, then what the mixed model's
    file is spent on, and sizes that the export fixed, with its reason.

    Args:
        report: From `build_report`.
        console: Where to.
    """
    console.print(layer_table(report, name_length=console.width - _OTHER_COLUMNS))
    if report.refinements:
        console.print()
        console.print(refinement_table(report, name_length=_REFINED_NAME))
    console.print()
    console.print(comparison_table(report))
    file_lines = [] if report.parts is None else [f"main file: {report.parts}"]
    sizes = fixed_size_lines(report.fixed_sizes)
    for line in [*own_cost_lines(report), *file_lines, *sizes]:
        console.print(line, markup=False, highlight=False)


def _narrow_table(title: str) -> Table:
    """A table that fits 80 columns, the width where output is no terminal; the title as it is."""
    padding = (0, 1, 0, 0)
    return Table(
        title=escape(title),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=padding,
        pad_edge=False,
    )
