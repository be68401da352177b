"""The picture of a refinement: the SQNR of every layer's output, before and after each method."""

from __future__ import annotations

from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from fxmpq.report.refinements import WHOLE_MODEL, Cell, RefinementGrid, refinement_grid
from fxmpq.report.report import Report
from fxmpq.report.style import BLUE, GREY, GRID, STYLE, VERMILION, svg_text
from fxmpq.wording import shortened


def draw_refinement(report: Report) -> Figure:
    """Draw a panel a method: for each layer a line from the SQNR before to the SQNR after.

    Blue lines go up, orange ones down; a layer whose output is without any error has no place
    on a scale of decibels and is left out.

    Args:
        report: With refinements.

    Returns:
        A figure of its own, in no global state.
    """
    grid = refinement_grid(report.refinements, [row.layer for row in report.layers])
    with rc_context(STYLE):
        height = 1.9 + 0.23 * len(grid.layers)
        figure = Figure(figsize=(12.5, max(2.6, height)), layout="constrained")
        panels = figure.subplots(1, len(grid.methods), sharex=True, sharey=True, squeeze=False)[0]
        for axes, method in zip(panels, grid.methods, strict=True):
            _draw_panel(axes, grid, method)
        _label_layers(panels[0], grid)
        figure.supxlabel("SQNR of the output against float in dB", fontsize=10)
        figure.legend(handles=_legend(), loc="outside upper right", ncols=3, frameon=False)
    return figure


def refinement_svg(report: Report) -> str:
    """The picture as SVG text for a page: an `<svg>` element, letters drawn as paths.

    Args:
        report: With refinements.
    """
    return svg_text(draw_refinement(report))


def save_refinement(report: Report, folder: str | Path) -> tuple[Path, ...]:
    """Write `refinement.png` and `refinement.svg`.

    Args:
        report: From `build_report`.
        folder: Where to, made if missing.

    Returns:
        The two files; none for a report without refinements.
    """
    if not report.refinements:
        return ()
    home = Path(folder)
    home.mkdir(parents=True, exist_ok=True)
    png, svg = home / "refinement.png", home / "refinement.svg"
    with rc_context(STYLE):
        figure = draw_refinement(report)
        figure.savefig(png, dpi=160, facecolor="white")
        figure.savefig(svg, facecolor="white", metadata={"Date": None})
    return png, svg


def _draw_panel(axes: Axes, grid: RefinementGrid, method: str) -> None:
    axes.set_title(method, pad=8)
    for position, layer in enumerate(grid.layers):
        cell = grid.cells.get((layer, method))
        if cell is not None and cell.before is not None and cell.after is not None:
            _draw_change(axes, position, cell)
    axes.grid(visible=True, axis="x", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0, labelsize=8.5)
    axes.spines["left"].set_visible(False)


def _draw_change(axes: Axes, position: int, cell: Cell) -> None:
    assert cell.before is not None and cell.after is not None
    colour = BLUE if cell.gain >= 0 else VERMILION
    axes.plot([cell.before, cell.after], [position, position], color=colour, linewidth=2.2)
    axes.plot(cell.before, position, "o", color="white", markeredgecolor=GREY, markersize=5.5)
    axes.plot(cell.after, position, "o", color=colour, markersize=6.5, zorder=3)


def _label_layers(axes: Axes, grid: RefinementGrid) -> None:
    axes.set_yticks(range(len(grid.layers)), [shortened(layer) for layer in grid.layers])
    axes.set_ylim(len(grid.layers) - 0.4, -0.6)
    for layer, label in zip(grid.layers, axes.get_yticklabels(), strict=True):
        if layer == WHOLE_MODEL:
            label.set_fontweight("bold")


def _legend() -> list[Line2D]:
    marks = [
        ("before", "white", GREY),
        ("after, better", BLUE, BLUE),
        ("after, worse", VERMILION, VERMILION),
    ]
    return [
        Line2D([], [], label=label, linestyle="none", marker="o", color=fill, markeredgecolor=edge)
        for label, fill, edge in marks
    ]
