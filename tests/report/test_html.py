from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from fxmpq.report.html import highlights, render_html, save_html
from fxmpq.report.report import RefinementRow, Report
from fxmpq.targets.target import FileParts

VOID = {"meta", "use", "path", "rect", "line", "br"}


class Page(HTMLParser):
    """Collects text and attributes, and checks that every element is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [str(value) for name, value in attrs if name in ("src", "href")]
        self.links += [str(value) for name, value in attrs if name == "xlink:href"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("style", "script"):
            self.words += data.split()


@pytest.fixture
def page(report: Report) -> Page:
    return Page(render_html(report))


def test_it_is_well_formed_and_needs_no_other_file(page: Page) -> None:
    assert page.open == []
    assert page.links
    assert all(link.startswith("#") for link in page.links)  # within the picture


def test_it_tells_summary_comparison_layers_reasons_times_and_environment(page: Page) -> None:
    text = " ".join(page.words)
    assert "-0.25 points against float" in text
    assert "w4a8 92.00 % -1.75 12.0 dB 135 kB 13.5 % 1.00 G 3.3 % 0.51 ms" in text
    assert "stem w8a8 50.0 dB 1.00 kB 1.00 M QLinearConv" in text
    assert "shared with block.conv1" in text
    assert "attention.0 7.00 M it is fused" in text
    assert "measure 2.50 s in all 3.50 s" in text
    assert "cpu a processor" in text
    assert "model.onnx , 200 kB" in text
    assert "512 for the search, 4,000 for the test" in text


def test_text_from_the_report_is_escaped(report: Report) -> None:
    evil = "<script>alert(1)</script>"
    layers = tuple(replace(row, layer=f"{row.layer}{evil}") for row in report.layers)
    text = render_html(replace(report, title=evil, model=evil, layers=layers))
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)" in text
    assert "kept by &lt;you&gt;" in text


def test_it_says_when_nothing_stays_in_float(report: Report) -> None:
    text = render_html(replace(report, layers=report.layers[:3]))
    assert "Nothing: every layer with weights" in text
    assert not re.search("layer or operator", text)


def test_highlights_compare_the_mixed_model_with_float(report: Report) -> None:
    found = {label: (value, beside) for label, value, beside in highlights(report)}
    assert found["weights"] == ("150 kB", "15.0 % of 1.00 MB")
    assert found["latency"] == ("0.50 ms", "2.0 times as fast as float")
    assert found["output SQNR"] == ("25.0 dB", "predicted 26.0 dB")


def test_a_prediction_of_a_refined_model_says_what_it_is_of(report: Report) -> None:
    refined = replace(report, refinements=(RefinementRow("gptq", "stem", 0.2, 0.1),))
    found = {label: beside for label, _, beside in highlights(refined)}
    assert found["output SQNR"] == "predicted before refinement 26.0 dB"
    assert "best plans, predicted before refinement" in render_html(refined)
    assert "best plans, predicted before" not in render_html(report)


def test_what_the_main_file_is_spent_on_is_told_where_it_is_known(report: Report) -> None:
    assert "main file" not in render_html(report)
    told = replace(report, parts=FileParts(weights=150_000, parameters=900, graph=11_216))
    assert f"<dt>main file</dt><dd>{told.parts}</dd>" in render_html(told)


def test_it_is_written_to_a_file(report: Report, tmp_path: Path) -> None:
    file = save_html(report, tmp_path / "report.html")
    assert file.read_text(encoding="utf-8") == render_html(report)


def test_a_method_that_predicts_nothing_says_so(report: Report) -> None:
    quiet = replace(report, unit="score", method="entropy")
    assert ("output SQNR", "the method entropy predicts none") in [
        (name, beside) for name, _, beside in highlights(quiet)
    ]
    note = "predicted output SQNR with only"
    assert note in render_html(report)
    assert note not in render_html(quiet)


def test_refinement_is_shown_where_it_was_done(report: Report) -> None:
    assert "Refinement" not in Page(render_html(report)).words
    rows = (RefinementRow("gptq", "stem", 10.0, 12.5), RefinementRow("tune", "", 8.0, 9.0))
    refined = replace(report, refinements=rows)
    page = Page(render_html(refined))
    text = " ".join(page.words)
    assert page.open == []
    assert "Refinement" in page.words
    assert "All figures layer gptq tune stem 12.5 +2.5 whole model 9.0 +1.0" in text
    assert render_html(refined).count("<svg") == 2
    ids = re.findall(r'\bid="([^"]+)"', render_html(refined))
    assert all(link.removeprefix("#") in ids for link in page.links)


def test_costs_that_not_every_target_has_stand_below_the_comparison(report: Report) -> None:
    mixed = replace(report.entries["mixed"], costs={"cycles": 3_000.0})
    page = render_html(replace(report, entries={**report.entries, "mixed": mixed}))
    assert "cycles by the cost table: mixed 3.00 k.</p>" in page
    assert "target&#39;s figures" not in render_html(report)
