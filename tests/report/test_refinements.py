from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import fx

from fxmpq.graph.state import Refinement, copy_graph, state_of, with_state
from fxmpq.quantized import Quantized
from fxmpq.report.refinements import (
    WHOLE_MODEL,
    refinement_grid,
    refinement_rows,
    refinement_rows_text,
)
from fxmpq.report.report import RefinementRow


def refined(quantized: Quantized, *found: Refinement) -> fx.GraphModule:
    graph = copy_graph(quantized.graph)
    return with_state(graph, replace(state_of(graph), refinements=found))


@given(st.floats(1e-9, 50), st.floats(1e-9, 50))
def test_errors_become_decibels(quantized: Quantized, before: float, after: float) -> None:
    [row] = refinement_rows(refined(quantized, Refinement("gptq", "conv1", before, after)))
    assert (row.method, row.layer) == ("gptq", "conv1")
    assert row.before_db is not None
    assert row.after_db is not None
    assert 10 ** (-row.before_db / 10) == pytest.approx(before)
    assert 10 ** (-row.after_db / 10) == pytest.approx(after)


def test_no_error_and_an_infinite_one(quantized: Quantized) -> None:
    graph = refined(quantized, Refinement("gptq", "conv1", math.inf, 0.0))
    assert refinement_rows(graph) == (RefinementRow("gptq", "conv1", -100.0, None),)
    assert refinement_rows(quantized.graph) == ()


def test_of_stitched_formats_only_the_chosen_ones_are_told(quantized: Quantized) -> None:
    state = state_of(quantized.graph)
    found, wanted = [], []
    for group in state.groups:
        bits = group.candidate(state.choices[group.name]).weight_bits
        for layer in group.layers:
            found += [
                Refinement("gptq", layer.name, 0.5, 1 / width, f"int{width}") for width in (2, 4, 8)
            ]
            wanted.append((layer.name, 10 * math.log10(bits or 0)))
    rows = refinement_rows(refined(quantized, *found, Refinement("bias_tuning", "", 1.0, 0.1)))
    *layers, last = rows
    assert [row.layer for row in layers] == [name for name, _ in wanted]
    assert [row.after_db for row in layers] == pytest.approx([db for _, db in wanted])
    assert last == RefinementRow("bias_tuning", "", pytest.approx(0.0, abs=1e-9), 10.0)


def test_a_grid_has_layers_in_order_and_methods_as_they_were_used() -> None:
    rows = [
        RefinementRow("gptq", "b", 1.0, 3.0),
        RefinementRow("gptq", "a", 2.0, 1.5),
        RefinementRow("tune", "", 4.0, 5.0),
        RefinementRow("gptq", "b", 3.0, None),
        RefinementRow("brecq", "c", None, None),
    ]
    grid = refinement_grid(rows, ["a", "b", "never refined"])
    assert grid.layers == ("a", "b", "c", WHOLE_MODEL)
    assert grid.methods == ("gptq", "tune", "gptq (2)", "brecq")
    assert refinement_rows_text(grid) == {
        "a": (("1.5", "-0.5"), ("", ""), ("", ""), ("", "")),
        "b": (("3.0", "+2.0"), ("", ""), ("exact", ""), ("", "")),
        "c": (("", ""), ("", ""), ("", ""), ("exact", "")),
        WHOLE_MODEL: (("", ""), ("5.0", "+1.0"), ("", ""), ("", "")),
    }
    assert [cell.gain for cell in grid.cells.values()] == [2.0, -0.5, 1.0, 0.0, 0.0]


def test_nothing_makes_an_empty_grid() -> None:
    grid = refinement_grid([], ["a"])
    assert (grid.methods, grid.layers, grid.cells) == ((), (), {})
    assert refinement_rows_text(grid) == {}
