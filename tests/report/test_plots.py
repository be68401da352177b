from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from fxmpq.report.plots import bit_colour, draw, picture_svg, save_picture
from fxmpq.report.report import CurvePoint, LayerRow, Report


def texts(figure: Figure) -> list[str]:
    FigureCanvasAgg(figure).draw()
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def drawn_texts(axes: Axes) -> list[Text]:
    """Ticks beyond the axes are laid out, but matplotlib does not draw them."""
    found = [*axes.texts, axes.xaxis.label, axes.yaxis.label, axes._left_title]
    for axis in (axes.xaxis, axes.yaxis):
        low, high = sorted(axis.get_view_interval())
        found += [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
    if axes.get_legend() is not None:
        found += [*axes.get_legend().get_texts(), axes.get_legend().get_title()]
    return [text for text in found if text.get_text()]


def many_layers(report: Report, count: int) -> Report:
    names = [f"encoder.layer.{i}.attention.output.dense" for i in range(count)]
    rows = (LayerRow(name, name, f"w{2 + i % 7}a8", 1.0, 1, 1, "k") for i, name in enumerate(names))
    return replace(report, layers=tuple(rows))


def test_it_names_every_model_with_its_score_and_every_layer(report: Report) -> None:
    found = texts(draw(report))
    for label in ("float  93.8 %", "mixed  93.5 %", "w8a8  93.7 %", "w4a8  92.0 %", "w2a8  30.0 %"):
        assert label in found
    assert {"stem", "block.conv1", "block.short", "head"} <= set(found)
    assert "attention.0" not in found  # it has no weights
    assert "float" in found  # beside the bar of the head


def test_bars_are_as_long_as_the_weights_are_wide(report: Report) -> None:
    _, bars = draw(report).axes
    assert [patch.get_width() for patch in bars.patches] == [8, 4, 4, 8]
    assert [patch.get_hatch() for patch in bars.patches] == [None, None, None, "///"]


@pytest.mark.parametrize("layers", [5, 30, 41, 80])
@pytest.mark.parametrize("lift", [-3.0, 0.0, 3.0])
def test_no_two_labels_overlap(report: Report, layers: int, lift: float) -> None:
    """`lift` moves the predicted curve against the measured points."""
    curve = tuple(CurvePoint(p.weight_bytes, p.sqnr_db + lift) for p in report.curve)
    figure = draw(replace(many_layers(report, layers), curve=curve))
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    edges = figure.bbox
    for axes in figure.axes:
        shown = drawn_texts(axes)
        boxes = [text.get_window_extent(canvas.get_renderer()) for text in shown]
        for text, box in zip(shown, boxes, strict=True):
            inside = edges.x0 <= box.x0 and box.x1 <= edges.x1 and box.y1 <= edges.y1
            assert inside, text.get_text()
        pairs = itertools.combinations(zip(shown, boxes, strict=True), 2)
        for (one, first), (two, second) in pairs:
            assert not first.overlaps(second), (one.get_text(), two.get_text())


def test_many_layers_stand_in_columns_below_the_curve(report: Report) -> None:
    figure = draw(many_layers(report, 76))
    assert [len(axes.patches) for axes in figure.axes] == [0, 26, 26, 24]


def test_a_report_without_a_curve_or_with_one_model_is_drawn(report: Report) -> None:
    entries = {"mixed": report.entries["mixed"]}
    assert "mixed  93.5 %" in texts(draw(replace(report, curve=(), entries=entries)))


def test_both_files_are_written_and_are_what_they_say(report: Report, tmp_path: Path) -> None:
    png, svg = save_picture(report, tmp_path / "new" / "folder")
    assert (png.name, svg.name) == ("tradeoff.png", "tradeoff.svg")
    assert png.read_bytes().startswith(b"\x89PNG")
    assert ET.parse(svg).getroot().tag == "{http://www.w3.org/2000/svg}svg"


def test_the_inline_picture_is_one_element_and_the_same_each_time(report: Report) -> None:
    text = picture_svg(report)
    assert text.startswith("<svg")
    assert ET.fromstring(text).tag.endswith("svg")
    assert picture_svg(report) == text


def test_more_bits_are_darker() -> None:
    def brightness(bits: int) -> int:
        colour = bit_colour(bits)
        return sum(int(colour[i : i + 2], 16) for i in (1, 3, 5))

    widths = [2, 3, 4, 5, 6, 7, 8]
    assert [brightness(bits) for bits in widths] == sorted(map(brightness, widths), reverse=True)
    assert len({bit_colour(bits) for bits in widths}) == len(widths)
