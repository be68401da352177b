from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from fxmpq.errors import FileFormatError
from fxmpq.report.report import LayerRow, RefinementRow, Report, finite_or_none
from fxmpq.targets.target import FileParts


def test_it_survives_a_file(report: Report, tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    assert report.to_json(file) == file.read_text()
    assert Report.from_json(file) == report


def test_the_file_names_every_entrys_figures(report: Report) -> None:
    content = json.loads(report.to_json())
    assert (content["schema"], content["version"]) == ("fxmpq.report", 2)
    assert list(content["entries"]) == ["float", "mixed", "w8a8", "w4a8", "w2a8"]
    assert content["entries"]["mixed"] == {
        "score": 0.935,
        "sqnr_db": 25.0,
        "weight_bytes": 150_000,
        "bops": 1_500_000_000,
        "latency_ms": 0.5,
        "costs": {},
    }
    assert content["search_seconds"] == {"trace": 1.0, "measure": 2.5}
    assert content["environment"]["cpu"] == "a processor"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"entries": [1]}, "'entries' maps names"),
        ({"entries": {"float": {"score": 1.0}}}, "missing 4 required"),
        ({"entries": {"float": 3}}, "expected a Entry as an object; found 3"),
        ({"layers": {"a": 1}}, "expected a list of LayerRow"),
        ({"curve": [{"weight_bytes": 1, "sqnr_db": 2.0, "colour": "red"}]}, "colour"),
        ({"titel": "x"}, "unknown fields \\['titel'\\]"),
        ({"version": 1}, "expected version 2"),
    ],
)
def test_files_that_hold_something_else_are_refused(
    report: Report, change: dict[str, object], words: str
) -> None:
    content = {**json.loads(report.to_json()), **change}
    with pytest.raises(FileFormatError, match=words):
        Report.from_json(json.dumps(content))


def test_infinity_becomes_none_and_nan_is_refused() -> None:
    assert finite_or_none(math.inf) is None
    assert finite_or_none(None) is None
    assert finite_or_none(3.5) == 3.5
    with pytest.raises(FileFormatError, match="NaN"):
        finite_or_none(math.nan)


def test_an_infinite_perplexity_survives_a_file(report: Report) -> None:
    broken = replace(report.entries["w2a8"], score=math.inf)
    lost = replace(report, metric="perplexity", entries={**report.entries, "w2a8": broken})
    assert json.loads(lost.to_json())["entries"]["w2a8"]["score"] is None
    assert Report.from_json(lost.to_json()) == lost


@pytest.mark.parametrize(("group", "shared"), [("a", False), ("b", True), ("", False)])
def test_a_layer_is_shared_where_another_names_its_group(group: str, shared: bool) -> None:
    assert LayerRow("a", group, "w8a8", 1.0, 1, 1, "kernel").is_shared is shared


def test_the_parts_of_a_file_survive_one(report: Report) -> None:
    told = replace(report, parts=FileParts(weights=3, parameters=2, graph=1))
    assert Report.from_json(told.to_json()) == told
    content = json.loads(told.to_json())
    with pytest.raises(FileFormatError, match="expected a FileParts as an object"):
        Report.from_json(json.dumps({**content, "parts": [3, 2, 1]}))
    del content["parts"]
    assert Report.from_json(json.dumps(content)) == report


def test_refinements_survive_a_file_and_older_files_have_none(report: Report) -> None:
    rows = (RefinementRow("gptq", "stem", 10.0, 12.5), RefinementRow("tune", "", 8.0, None))
    refined = replace(report, refinements=rows)
    content = json.loads(refined.to_json())
    assert content["refinements"][0] == {
        "method": "gptq",
        "layer": "stem",
        "before_db": 10.0,
        "after_db": 12.5,
    }
    assert Report.from_json(refined.to_json()) == refined
    del content["refinements"]
    assert Report.from_json(json.dumps(content)) == report
    with pytest.raises(FileFormatError, match="expected a list of RefinementRow"):
        Report.from_json(json.dumps({**content, "refinements": {"gptq": 1}}))
