"""The report as one self-contained page."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from fxmpq.artefact import write_atomically
from fxmpq.report.compare import FLOAT, MIXED
from fxmpq.report.metrics import METRICS
from fxmpq.report.plots import picture_svg
from fxmpq.report.refinement_plot import refinement_svg
from fxmpq.report.refinements import WHOLE_MODEL, refinement_grid, refinement_rows_text
from fxmpq.report.report import Report
from fxmpq.report.sizes import fixed_size_lines
from fxmpq.report.tables import comparison_columns, comparison_rows, own_cost_lines
from fxmpq.wording import counted, decibels, percent

_TEMPLATE = "report.html.jinja"


def render_html(report: Report) -> str:
    """Render a report as an HTML page that needs no other file and no network.

    It holds a summary, the comparison, the picture as inline SVG, the layers, what refinement did
    to them, what stays in float and why, the search's times and the environment. Text from the
    report is escaped.

    Args:
        report: From `build_report`, with entries `float` and `mixed`.

    Returns:
        The page's text.
    """
    environment = Environment(
        loader=PackageLoader("fxmpq.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(counted=counted, decibels=decibels)
    grid = refinement_grid(report.refinements, [row.layer for row in report.layers])
    return environment.get_template(_TEMPLATE).render(
        report=report,
        columns=comparison_columns(report),
        rows=comparison_rows(report),
        own_costs=own_cost_lines(report),
        mixed=MIXED,
        highlights=highlights(report),
        facts=_facts(report),
        quantized=[row for row in report.layers if row.precision != "fp32"],
        in_float=[row for row in report.layers if row.precision == "fp32"],
        grid=grid,
        refined=refinement_rows_text(grid),
        whole_model=WHOLE_MODEL,
        # Drawn by matplotlib from numbers and escaped names: the only markup let through.
        picture=Markup(picture_svg(report)),  # noqa: S704
        refinement=Markup(refinement_svg(report) if report.refinements else ""),  # noqa: S704
    )


def save_html(report: Report, path: str | Path) -> Path:
    """Write the page to a file, in one move.

    Args:
        report: From `build_report`.
        path: The file.

    Returns:
        The same path.
    """
    file = Path(path)
    write_atomically(file, render_html(report))
    return file


def highlights(report: Report) -> list[tuple[str, str, str]]:
    """The summary's figures for the mixed model: what it is, its value, and beside what.

    Args:
        report: With entries `float` and `mixed`.

    Returns:
        Triples of label, value and comparison.
    """
    base, mixed = report.entries[FLOAT], report.entries[MIXED]
    metric = METRICS[report.metric]
    size_share = percent(mixed.weight_bytes / base.weight_bytes)
    bops_share = percent(mixed.bops / base.bops) if base.bops else "none"
    return [
        (
            metric.name,
            metric.text(mixed.score, 2),
            f"{metric.difference(mixed.score, base.score)}{metric.unit} against float",
        ),
        (
            "weights",
            counted(mixed.weight_bytes, "B"),
            f"{size_share} of {counted(base.weight_bytes, 'B')}",
        ),
        ("output SQNR", decibels(mixed.sqnr_db), _prediction(report)),
        (
            "bit operations",
            counted(mixed.bops),
            f"{bops_share} of {counted(base.bops)}",
        ),
        (
            "latency",
            f"{mixed.latency_ms:.2f} ms",
            f"{base.latency_ms / mixed.latency_ms:.1f} times as fast as float",
        ),
    ]


def _prediction(report: Report) -> str:
    if not report.is_predicting:
        return f"the method {report.method} predicts none"
    return f"{report.prediction} {decibels(report.predicted_sqnr_db)}"


def _facts(report: Report) -> list[tuple[str, str]]:
    return [
        ("model", report.model),
        ("data", report.data),
        ("target", report.target),
        ("budget", report.budget),
        ("sensitivity", report.method),
        (
            "samples",
            f"{report.calibration_samples:,} for the search, {report.test_samples:,} for the test",
        ),
        ("solver's proven gap", "unknown" if report.gap is None else percent(report.gap, 2)),
        ("converted against simulated", decibels(report.agreement_db)),
        *(("size", line) for line in fixed_size_lines(report.fixed_sizes)),
    ]
