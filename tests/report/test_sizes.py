from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, fx, nn

import fxmpq
from fxmpq.graph.state import FixedSize, copy_graph, state_of, with_state
from fxmpq.quantized import Quantized
from fxmpq.report.build import build_report
from fxmpq.report.groups import describe_groups
from fxmpq.report.html import render_html
from fxmpq.report.report import Report
from fxmpq.report.sizes import fixed_size_lines
from fxmpq.report.tables import print_tables


class Positions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(9, 4), nn.Linear(4, 3)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.head(self.table(ids + torch.arange(6)) * mask[..., None])


def test_free_sizes_need_no_words() -> None:
    assert fixed_size_lines(()) == []


def test_inputs_of_one_reason_share_a_line() -> None:
    sizes = [
        FixedSize("ids", 0, 2, "for this"),
        FixedSize("ids", 1, 6, "for this"),
        FixedSize("mask", 0, 2, "for this"),
        FixedSize("other", 0, 2, "for that"),
    ]
    assert fixed_size_lines(sizes) == [
        "the batch size of ids and mask is fixed at 2: for this",
        "the sequence length of ids is fixed at 6: for this",
        "the batch size of other is fixed at 2: for that",
    ]


def test_a_models_own_line_is_told() -> None:
    ids = torch.ones(2, 6, dtype=torch.long)
    graph = fxmpq.trace(Positions(), {"ids": ids, "mask": torch.ones_like(ids)})
    assert state_of(graph).dynamic
    lines = fixed_size_lines(state_of(graph).fixed_sizes)
    assert len(lines) in (1, 2)
    assert lines[0].startswith("the sequence length of ids")
    assert all("self.table(ids + torch.arange(6))" in line for line in lines)


REASON = "the model fixes it at net.py:3: x[0] + ones"
FIXED = (FixedSize("ids", 0, 2, REASON),)
LINE = f"the batch size of ids is fixed at 2: {REASON}"


def test_inspect_tells_it() -> None:
    ids = torch.ones(2, 6, dtype=torch.long)
    graph = fxmpq.trace(Positions(), {"ids": ids, "mask": torch.ones_like(ids)})
    console = Console(width=300, record=True, file=io.StringIO())
    console.print(describe_groups(fxmpq.prepare(graph, "reference")))
    text = console.export_text()
    assert "sizes that are fixed" in text
    assert all(line in text for line in fixed_size_lines(state_of(graph).fixed_sizes))


def test_nothing_is_said_of_a_graph_whose_sizes_are_free(conv_graph: fx.GraphModule) -> None:
    console = Console(width=300, record=True, file=io.StringIO())
    console.print(describe_groups(fxmpq.prepare(conv_graph, "reference")))
    assert "fixed" not in console.export_text()


def test_the_report_tells_it_in_every_form(report: Report) -> None:
    told = replace(report, fixed_sizes=FIXED)
    assert Report.from_json(told.to_json()) == told
    assert LINE.replace("'", "&#39;") in render_html(told)
    console = Console(width=300, record=True, file=io.StringIO())
    print_tables(told, console)
    assert LINE in console.export_text()


def test_the_report_of_a_quantized_model_has_it(
    quantized: Quantized, images: list[Tensor], labels: Tensor
) -> None:
    graph = copy_graph(quantized.graph)
    with_state(graph, replace(state_of(graph), fixed_sizes=FIXED))
    fixed = replace(quantized, graph=graph)
    found = build_report(fixed, images, labels, title="fixed", uniform=[])
    assert found.fixed_sizes == FIXED


def test_it_is_saved_with_the_graph(tmp_path: Path) -> None:
    ids = torch.ones(2, 6, dtype=torch.long)
    graph = fxmpq.trace(Positions(), {"ids": ids, "mask": torch.ones_like(ids)})
    loaded = fxmpq.load(fxmpq.save(graph, tmp_path))
    assert state_of(loaded).fixed_sizes == state_of(graph).fixed_sizes != ()
