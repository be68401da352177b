"""The picture of a report: the trade-off curve, and beside it the bits of every layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from fxmpq.formats import Precision
from fxmpq.report.compare import FLOAT, MIXED
from fxmpq.report.metrics import METRICS
from fxmpq.report.report import Entry, LayerRow, Report
from fxmpq.report.style import BLUE, GREY, GRID, INK, SKY, STYLE, VERMILION, svg_text
from fxmpq.wording import shortened

# One hue from light to dark: length and shade say the same.
_BIT_COLOURS = ("#BBD7EC", "#9CC6E4", "#79B2DA", "#569DCF", "#3587C0", "#1B76B4", "#0A5A94")
_BIT_STEPS = (2, 3, 4, 5, 6, 7)
_BITS_TITLE = "Bits of every layer's weights"
_MOST_BESIDE = 40


def draw(report: Report) -> Figure:
    """Draw the trade-off curve with the measured models, and bars of the layers' bits.

    Left: predicted output SQNR of the best plan against weight size (logarithmic), and the
    measured models with their score; the float model, which has no error, sits at the top.
    Right: a bar a layer, as long as its weights are wide.

    Args:
        report: From `build_report`.

    Returns:
        A figure of its own, in no global state.
    """
    rows = _weighted(report)
    with rc_context(STYLE):
        if len(rows) <= _MOST_BESIDE:
            figure = Figure(figsize=(12.5, max(5.0, 1.4 + 0.23 * len(rows))), layout="constrained")
            left, right = figure.subplots(1, 2, width_ratios=(1.35, 1))
            _draw_curve(left, report)
            _draw_bits(right, rows, _widest(rows))
            right.set_title(_BITS_TITLE, pad=12)
        else:
            figure = _draw_tall(report)
    return figure


def picture_svg(report: Report) -> str:
    """The picture as SVG text for a page: an `<svg>` element, letters drawn as paths.

    Args:
        report: From `build_report`.
    """
    return svg_text(draw(report))


def save_picture(report: Report, folder: str | Path) -> tuple[Path, Path]:
    """Write `tradeoff.png` and `tradeoff.svg`.

    Args:
        report: From `build_report`.
        folder: Where to, made if missing.

    Returns:
        The two files.
    """
    home = Path(folder)
    home.mkdir(parents=True, exist_ok=True)
    png, svg = home / "tradeoff.png", home / "tradeoff.svg"
    with rc_context(STYLE):
        figure = draw(report)
        figure.savefig(png, dpi=160, facecolor="white")
        figure.savefig(svg, facecolor="white", metadata={"Date": None})
    return png, svg


def _draw_tall(report: Report) -> Figure:
    """The bars of many layers in columns below the curve."""
    rows, columns = _weighted(report), 3
    each = math.ceil(len(rows) / columns)
    heights = (5.0, 1.0 + 0.2 * each)
    figure = Figure(figsize=(13.5, sum(heights)), layout="constrained")
    grid = figure.add_gridspec(2, columns, height_ratios=heights)
    _draw_curve(figure.add_subplot(grid[0, :]), report)
    for column in range(columns):
        axes = figure.add_subplot(grid[1, column])
        part = rows[column * each : (column + 1) * each]
        _draw_bits(axes, part, _widest(rows))
        axes.set_ylim(each - 0.4, -0.6)
        axes.set_title(_BITS_TITLE if column == 0 else "", pad=12)
    return figure


def _draw_curve(axes: Axes, report: Report) -> None:
    samples = f"{report.test_samples:,} samples"
    axes.set_title(f"Output SQNR and {report.metric}, measured on {samples}", pad=12)
    axes.set_xscale("log")
    score = METRICS[report.metric].text
    sizes = [point.weight_bytes for point in report.curve]
    noise = [point.sqnr_db for point in report.curve]
    if sizes:
        axes.plot(
            sizes,
            noise,
            label=f"best plans, {report.prediction}",
            color=SKY,
            linewidth=2,
            marker="o",
            markersize=4,
            zorder=2,
        )
    for name, entry in report.entries.items():
        if name != FLOAT and entry.sqnr_db is not None:
            predicted = np.interp(entry.weight_bytes, sizes, noise) if sizes else 0.0
            text = f"{name}  {score(entry.score, 1)}"
            place = entry.weight_bytes, entry.sqnr_db
            _mark(axes, name, text, place, above=entry.sqnr_db > predicted - 1.5)
    # Room for the labels: of the smallest model on the left, of float at the top.
    known = [*sizes, *(entry.weight_bytes for entry in report.entries.values())]
    decades = np.log10(max(known) / min(known)) or 1.0
    axes.set_xlim(min(known) / 10 ** (0.3 * decades), max(known) * 10 ** (0.1 * decades))
    axes.margins(y=0.1)
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.12 * (high - low))
    if FLOAT in report.entries:
        base = report.entries[FLOAT]
        _mark_float(axes, f"{FLOAT}  {score(base.score, 1)}", base)
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: _size_label(size)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("size of the weights, scales included")
    axes.set_ylabel("output SQNR in dB")
    axes.grid(visible=True, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    # Below the axes no point can come in its way.
    axes.legend(
        loc="upper center",
        bbox_to_anchor=(0.5, -0.1),
        ncols=4,
        frameon=False,
        columnspacing=1.4,
        handletextpad=0.4,
    )


def _mark(axes: Axes, name: str, text: str, place: tuple[int, float], *, above: bool) -> None:
    """Mark a measured model; labels lie where a rising curve leaves room for them."""
    mixed = name == MIXED
    colour = VERMILION if mixed else BLUE
    first_uniform = "uniform" not in axes.get_legend_handles_labels()[1]
    axes.plot(
        *place,
        label="mixed" if mixed else "uniform" if first_uniform else None,
        color=colour,
        linestyle="none",
        marker="*" if mixed else "s",
        markersize=17 if mixed else 8,
        markeredgecolor="white",
        zorder=4 if mixed else 3,
    )
    axes.annotate(
        text,
        place,
        xytext=(-9, 6) if above else (9, -6),
        textcoords="offset points",
        ha="right" if above else "left",
        va="bottom" if above else "top",
        color=colour,
        weight="bold" if mixed else "normal",
        zorder=5,
    )


def _mark_float(axes: Axes, text: str, entry: Entry) -> None:
    """Mark the float model at the upper edge: no error is no place on a scale of decibels."""
    _, top = axes.get_ylim()
    axes.plot(
        entry.weight_bytes,
        top,
        label="float: no error",
        color=INK,
        linestyle="none",
        marker="^",
        markersize=10,
        clip_on=False,
        zorder=5,
    )
    axes.annotate(
        text,
        (entry.weight_bytes, top),
        xytext=(6, -10),
        textcoords="offset points",
        ha="right",
        va="top",
    )


def _size_label(size: float) -> str:
    return f"{size / 1e6:g} MB" if size >= 1e6 else f"{size / 1e3:g} kB"


def _weighted(report: Report) -> list[LayerRow]:
    """Products of activations have no weights whose bits one could draw."""
    return [row for row in report.layers if row.group]


def _widest(rows: Sequence[LayerRow]) -> int:
    return max((Precision.parse(row.precision).weight_bits or 0 for row in rows), default=0) or 8


def _draw_bits(axes: Axes, rows: Sequence[LayerRow], widest: int) -> None:
    widths = [Precision.parse(row.precision).weight_bits for row in rows]
    for position, (row, bits) in enumerate(zip(rows, widths, strict=True)):
        if bits is None:
            axes.barh(position, widest, color="white", edgecolor=GREY, hatch="///", height=0.72)
        else:
            axes.barh(position, bits, color=bit_colour(bits), height=0.72)
        label = "float" if bits is None else row.precision
        end = widest if bits is None else bits
        axes.text(end + 0.015 * widest, position, label, va="center", fontsize=8.5)
    axes.set_yticks(range(len(rows)), [shortened(row.layer) for row in rows])
    axes.tick_params(axis="y", length=0, labelsize=8.5)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, 1.18 * widest)
    axes.set_xticks([bits for bits in (0, 2, 4, 6, 8, 12, 16) if bits <= widest])
    axes.set_xlabel("bits")
    axes.spines["left"].set_visible(False)


def bit_colour(bits: int) -> str:
    """A colour per weight width, from light (few bits) to dark (many).

    Examples:
        >>> bit_colour(2) != bit_colour(8) == bit_colour(16)
        True
    """
    return _BIT_COLOURS[sum(bits > step for step in _BIT_STEPS)]
