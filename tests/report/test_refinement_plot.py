from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree as ET

import matplotlib.pyplot as plt
import pytest

from fxmpq.report.refinement_plot import draw_refinement, refinement_svg, save_refinement
from fxmpq.report.report import RefinementRow, Report
from fxmpq.report.style import BLUE, VERMILION


@pytest.fixture
def refined(report: Report) -> Report:
    rows = (
        RefinementRow("gptq", "stem", 10.0, 14.0),
        RefinementRow("gptq", "block.conv1", 12.0, 11.0),
        RefinementRow("gptq", "block.short", 12.0, None),
        RefinementRow("bias_tuning", "", 8.0, 9.5),
    )
    return replace(report, refinements=rows)


def test_a_panel_a_method_with_a_line_a_layer(refined: Report) -> None:
    figure = draw_refinement(refined)
    left, right = figure.axes
    assert [axes.get_title(loc="left") for axes in (left, right)] == ["gptq", "bias_tuning"]
    labels = [label.get_text() for label in left.get_yticklabels()]
    assert labels == ["stem", "block.conv1", "block.short", "whole model"]
    lines = [line for line in left.lines if len(line.get_xdata()) == 2]
    assert [(list(line.get_xdata()), line.get_color()) for line in lines] == [
        ([10.0, 14.0], BLUE),
        ([12.0, 11.0], VERMILION),
    ]
    [change] = [line for line in right.lines if len(line.get_xdata()) == 2]
    assert list(change.get_ydata()) == [3, 3]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "before",
        "after, better",
        "after, worse",
    ]
    assert plt.get_fignums() == []


def test_text_is_within_the_figure_however_many_layers(report: Report) -> None:
    for count in (1, 60):
        rows = tuple(
            RefinementRow("gptq", f"encoder.layer.{i}.attention.dense", 9.0, 10.0 + i)
            for i in range(count)
        )
        figure = draw_refinement(replace(report, refinements=rows))
        figure.draw_without_rendering()
        width, height = figure.get_size_inches() * figure.dpi
        for axes in figure.axes:
            for label in axes.get_yticklabels():
                box = label.get_window_extent()
                assert box.x0 >= 0
                assert box.x1 <= width
                assert box.y0 >= 0
                assert box.y1 <= height


def test_files_are_written_where_there_is_something(refined: Report, tmp_path: Path) -> None:
    png, svg = save_refinement(refined, tmp_path / "new")
    assert png.read_bytes().startswith(b"\x89PNG")
    assert ET.fromstring(svg.read_text()).tag.endswith("svg")
    assert save_refinement(replace(refined, refinements=()), tmp_path / "none") == ()
    assert not (tmp_path / "none").exists()


def test_the_svg_is_reproducible(refined: Report) -> None:
    text = refinement_svg(refined)
    assert text.startswith("<svg")
    assert refinement_svg(refined) == text
