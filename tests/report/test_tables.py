from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from fxmpq.report.report import Entry, RefinementRow, Report
from fxmpq.report.tables import (
    comparison_columns,
    comparison_rows,
    comparison_table,
    layer_table,
    print_tables,
)
from fxmpq.targets.target import FileParts


def printed(report: Report, width: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    print_tables(report, console)
    text = console.file.getvalue()
    return [" ".join(line.split()) for line in text.splitlines() if line.strip()]


def test_every_row_fits_eighty_columns_uncut(report: Report) -> None:
    lines = printed(report, 80)
    assert "float 93.75 % 131.0 dB 1.00 MB 100.0 % 30.0 G 100.0 % 1.00 ms" in lines
    assert "mixed 93.50 % -0.25 25.0 dB 150 kB 15.0 % 1.50 G 5.0 % 0.50 ms" in lines
    assert "stem w8a8 50.0 dB 1.00 kB 1.00 M QLinearConv" in lines
    assert "block.short w4a8 shared 500 B 500 k QLinearConv" in lines
    assert not any("…" in line for line in lines)


def test_names_in_brackets_are_no_markup(report: Report) -> None:
    row = replace(report.layers[0], layer="[/x].[red]stem", kernel="[b]", reason="kept [/here]")
    refined = RefinementRow("gptq", "[/x].[red]stem", 20.0, 22.0)
    odd = replace(report, layers=(row,), budget="[/y]", target="[/z]", refinements=(refined,))
    lines = printed(odd, 120)
    assert lines[0] == "Layers at [/y] on [/z]"
    assert any(line.startswith("[/x].[red]stem w8a8") for line in lines)
    assert any(line.startswith("[/x].[red]stem 22.0") for line in lines)
    assert any("[b] (1)" in line for line in lines)
    assert "(1) kept [/here]" in lines


def with_costs(report: Report) -> Report:
    """A target of one's own, whose models the reference ran."""
    costs = {
        "float": {"cycles": 60_000.0},
        "mixed": {"cycles": 3_000.0, "energy": 0.4},
        "w8a8": {"cycles": 1_500.0, "energy": 0.0},
    }
    entries = {name: replace(report.entries[name], costs=found) for name, found in costs.items()}
    return replace(report, entries=entries, target="npu", runtime="reference")


def test_costs_that_not_every_target_has_are_told(report: Report) -> None:
    lines = printed(with_costs(report), 120)
    says = "by the cost table: "
    assert f"cycles {says}float 60.0 k, mixed 3.00 k (5.0 %), w8a8 1.50 k (2.5 %)" in lines
    assert f"energy {says}mixed 0.4, w8a8 0" in lines
    assert not any(says in line for line in printed(report, 120))


def test_costs_have_units_where_they_are_known(report: Report) -> None:
    costs = {"energy": 3.2e9, "latency": 0.5, "activation_memory": 162_168.0, "cycles": 10.0}
    entries = {**report.entries, "mixed": replace(report.entries["mixed"], costs=costs)}
    units = {"energy": "pJ", "latency": "ms", "activation_memory": "B"}
    lines = printed(replace(report, entries=entries, cost_units=units), 120)
    shown = ["energy mixed 3.20 mJ", "latency mixed 0.50 ms", "activation_memory mixed 162 kB"]
    for line in [*shown, "cycles mixed 10"]:
        assert line.replace(" ", " by the cost table: ", 1) in lines


def test_what_ran_the_models_is_told(report: Report) -> None:
    lines = printed(with_costs(report), 120)
    assert "Layers at weights=15% on npu" in lines
    assert "On 4,000 test samples, all running on reference" in lines
    assert "On 4,000 test samples, all running on onnxruntime" in printed(report, 120)


def test_what_stays_float_has_a_reason_and_no_sensitivity(report: Report) -> None:
    lines = printed(report, 120)
    assert "head fp32 4.00 kB 3.00 M float (1)" in lines
    assert "attention.0 fp32 0 B 7.00 M float (2)" in lines
    assert "(1) kept by <you>" in lines
    assert "(2) it is fused" in lines


def test_a_reason_stands_once_below_the_table(report: Report) -> None:
    rows = tuple(replace(row, reason="for reasons") for row in report.layers[:2])
    table = layer_table(replace(report, layers=(*rows, report.layers[2])))
    assert list(table.columns[-1].cells) == ["QLinearConv (1)", "QLinearConv (1)", "QLinearConv"]
    assert table.caption == "(1) for reasons"
    assert layer_table(replace(report, layers=report.layers[2:3])).caption is None


@pytest.mark.parametrize(
    ("width", "name"),
    [(80, "e.l.11.output.dense"), (120, "encoder.layer.11.output.dense")],
)
def test_long_names_are_whole_where_there_is_room(report: Report, width: int, name: str) -> None:
    row = replace(report.layers[0], layer="encoder.layer.11.output.dense", group="")
    lines = printed(replace(report, layers=(row,)), width)
    assert any(line.startswith(name) for line in lines)


def test_titles_say_what_was_asked_and_measured(report: Report) -> None:
    assert str(layer_table(report).title) == "Layers at weights=15% on onnxruntime"
    assert str(comparison_table(report).title).startswith("On 4,000 test samples")


def test_a_model_without_products_has_no_share_of_them(report: Report) -> None:
    entries = {"float": Entry(1.0, None, 10, 0, 1.0), "mixed": Entry(1.0, None, 5, 0, 1.0)}
    rows = comparison_rows(replace(report, entries=entries))
    assert rows["mixed"] == ("100.00 %", "+0.00", "exact", "5 B", "50.0 %", "0", "", "1.00 ms")


def test_perplexities_are_shown_with_their_relative_change(report: Report) -> None:
    entries = {
        "float": Entry(16.0, None, 100, 50, 1.0),
        "mixed": Entry(16.42, 30.0, 15, 10, 1.0),
    }
    found = replace(report, metric="perplexity", entries=entries)
    assert comparison_columns(found)[:3] == ("perplexity", "change", "SQNR")
    rows = comparison_rows(found)
    assert rows["float"][:2] == ("16.00", "")
    assert rows["mixed"][:2] == ("16.42", "+2.6 %")
    assert comparison_columns(report)[:3] == ("accuracy", "points", "SQNR")
    large = Entry(29.74, 129.8, 14_700_000, 1_100_000_000_000, 117.81)
    lines = printed(replace(found, entries={"float": large, "mixed": large, "w4b32": large}), 80)
    assert "w4b32 29.74 +0.0 % 129.8 dB 14.7 MB 100.0 % 1.10 T 100.0 % 117.81 ms" in lines


def test_a_method_that_predicts_nothing_leaves_its_column_empty(report: Report) -> None:
    row = next(row for row in report.layers if row.alone_db is not None)
    alone = f"{row.alone_db:.1f} dB"
    assert any(alone in line for line in printed(report, 100))
    quiet = replace(report, unit="loss", entries=report.entries)
    table = layer_table(quiet)
    cells = list(table.columns[2].cells)
    assert set(cells) <= {"", "shared"}


def test_refinement_has_a_table_where_it_was_done(report: Report) -> None:
    assert not any("Refinement" in line for line in printed(report, 80))
    rows = (
        RefinementRow("gptq", "block.conv1", 12.0, 11.0),
        RefinementRow("gptq", "stem", 10.0, 14.0),
        RefinementRow("bias_correction", "stem", 14.0, None),
        RefinementRow("bias_tuning", "", 8.0, 9.5),
    )
    lines = printed(replace(report, refinements=rows), 80)
    start = lines.index("Refinement: SQNR in dB, gain")
    assert lines[start + 1] == "layer gptq bias_correction bias_tuning"
    assert lines[start + 3 : start + 6] == [
        "stem 14.0 +4.0 exact",
        "block.conv1 11.0 -1.0",
        "whole model 9.5 +1.5",
    ]
    assert lines[start + 6].startswith("On 4,000 test samples")


def test_what_the_main_file_is_spent_on_is_told_where_it_is_known(report: Report) -> None:
    assert not any(line.startswith("main file") for line in printed(report, 80))
    told = replace(report, parts=FileParts(weights=150_000, parameters=900, graph=11_216))
    spent = "150 kB weights + 900 B other parameters + 11.2 kB graph"
    assert printed(told, 80)[-1] == f"main file: 162 kB = {spent}"
