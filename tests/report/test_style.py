from __future__ import annotations

from xml.etree import ElementTree as ET

from matplotlib import rc_context, rcParams
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from fxmpq.report.style import BLUE, GREY, GRID, INK, SKY, STYLE, VERMILION, svg_text


def test_svg_is_one_element_with_letters_as_paths() -> None:
    with rc_context(STYLE):
        figure = Figure(figsize=(2, 1))
        figure.text(0.5, 0.5, "<sensitivity>")
    text = svg_text(figure)
    assert text == svg_text(figure)
    assert ET.fromstring(text).tag == "{http://www.w3.org/2000/svg}svg"
    assert "<text" not in text


def test_every_colour_is_one_and_they_differ() -> None:
    colours = [INK, GREY, GRID, SKY, BLUE, VERMILION]
    assert len({to_rgb(colour) for colour in colours}) == len(colours)


def test_the_style_is_legal_and_changes_nothing_outside() -> None:
    before = dict(rcParams)
    with rc_context(STYLE):
        assert rcParams["axes.spines.top"] is False
    assert dict(rcParams) == before
