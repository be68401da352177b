"""Loading pieces and models."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

import fxmpq
from fxmpq.costs.latency.cut import cut
from fxmpq.costs.latency.variants import (
    Loaded,
    load_graph,
    load_piece,
)
from fxmpq.costs.measurable import calibrated_on_example
from fxmpq.errors import FxmpqError
from fxmpq.graph.state import state_of
from fxmpq.targets.onnxruntime import ONNXRUNTIME

from .conftest import CALL, CODES_LAYER, CONVERSION, FLOAT_LAYER, Machine


def test_a_piece_is_loaded_once_a_choice(prepared: fx.GraphModule, machine: Machine) -> None:
    piece = cut(prepared, ("conv2d_1", "relu_1"), "relu_1")
    choices = [("w8a8",), ("fp32",)]
    codes, real = load_piece(piece, choices, ONNXRUNTIME.rules, machine.runtime)
    assert machine.loaded == choices
    on_codes, on_floats = CALL + CODES_LAYER + 2 * CONVERSION, CALL + FLOAT_LAYER
    # Each has run before it is handed out.
    assert machine.now == on_codes + on_floats
    codes()
    assert machine.now == 2 * on_codes + on_floats
    real()
    assert machine.now == 2 * on_codes + 2 * on_floats
    assert isinstance(codes.batch, tuple)
    assert codes.batch[0].shape == (1, 3, 4, 4)


def test_a_product_of_two_activations_is_a_piece(machine: Machine) -> None:
    class Scores(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x @ x.tanh().transpose(1, 2)

    graph = fxmpq.trace(Scores(), torch.randn(2, 3, 4))
    graph = fxmpq.prepare(graph, ONNXRUNTIME, candidates=["a8"], products=True)
    (product,) = state_of(graph).groups[0].products
    piece = cut(graph, {product.node}, product.node)
    loaded = load_piece(piece, [("a8",), ("fp32",)], ONNXRUNTIME.rules, machine.runtime)
    assert loaded[0].batch is loaded[1].batch
    assert machine.loaded == [("a8",), ("fp32",)]
    # What is asked for alone where the rest was measured before.
    load_piece(piece, [("fp32",)], ONNXRUNTIME.rules, machine.runtime)
    assert machine.loaded[2:] == [("fp32",)]


def test_other_groups_than_are_named_are_refused(
    prepared: fx.GraphModule, machine: Machine
) -> None:
    piece = cut(prepared, ("conv2d",), "conv2d")
    with pytest.raises(FxmpqError, match="2 precisions are named for 1 groups"):
        load_piece(piece, [("w8a8", "w8a8")], ONNXRUNTIME.rules, machine.runtime)


def test_a_whole_model_may_be_float_where_its_candidates_are_not(machine: Machine) -> None:
    graph = fxmpq.trace(nn.Conv2d(2, 2, 1), torch.randn(2, 2, 4, 4))
    graph = calibrated_on_example(fxmpq.prepare(graph, ONNXRUNTIME, candidates=["w8a8"]))
    before = state_of(graph)
    (loaded,) = load_graph(graph, [("fp32",)], machine.runtime)
    loaded()
    assert machine.now == 2 * (CALL + FLOAT_LAYER)
    assert state_of(graph) is before
    assert [str(entry) for entry in before.groups[0].candidates] == ["w8a8"]


def test_a_loaded_model_runs_on_its_batch() -> None:
    assert Loaded(lambda batch: (batch, "ran"), (1,))() == ((1,), "ran")
