from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx

from fxmpq.calibration.calibrate import calibrate
from fxmpq.graph.prepare import insert_quantizers
from fxmpq.graph.state import state_of
from fxmpq.quantizers.modules import WeightQuantizer
from fxmpq.sensitivity.changes import weight_changes
from fxmpq.targets.registry import get_target

Planned = Callable[..., fx.GraphModule]


def test_changes_are_rounded_minus_float(
    conv_graph: fx.GraphModule, images: list[Tensor], calibrated: Planned
) -> None:
    graph = calibrated(conv_graph, images)
    for group in state_of(graph).groups:
        for layer in group.layers:
            found = weight_changes(graph, layer)
            weight = graph.get_parameter(layer.weight)
            assert found.bits == (2, 3, 4, 6, 8)
            assert found.weights.shape == (5, *weight.shape)
            scale = graph.get_submodule(str(layer.weight_quantizer)).get_buffer("scale_int8")
            steps = (found.weights[-1] + weight).flatten(1) / scale[:, None]
            torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-3)
            sizes = found.weights.flatten(1).norm(dim=1)
            assert (sizes[:-1] > sizes[1:]).all()
            assert found.shifts is not None
            assert found.shifts.shape == (5, len(weight))


def test_changes_equal_the_quantizers_to_the_last_bit(
    bert_graph: fx.GraphModule, token_batches: list[dict[str, Tensor]], calibrated: Planned
) -> None:
    graph = calibrated(bert_graph, token_batches)
    for layer in (layer for group in state_of(graph).groups for layer in group.layers):
        quantizer = graph.get_submodule(str(layer.weight_quantizer))
        assert isinstance(quantizer, WeightQuantizer)
        weight = graph.get_parameter(layer.weight).detach()
        found = weight_changes(graph, layer)
        for number_format, change in zip(quantizer.formats, found.weights, strict=True):
            assert torch.equal(change, quantizer.quantize(weight, number_format) - weight)


@pytest.mark.parametrize("name", ["bert.embeddings.word_embeddings", "classifier"])
def test_changes_of_some_rows(
    name: str,
    bert_graph: fx.GraphModule,
    token_batches: list[dict[str, Tensor]],
    calibrated: Planned,
) -> None:
    graph = calibrated(bert_graph, token_batches)
    layer = next(
        layer for group in state_of(graph).groups for layer in group.layers if layer.name == name
    )
    rows = torch.tensor([1, 0])
    whole, some = weight_changes(graph, layer), weight_changes(graph, layer, rows)
    assert torch.equal(some.weights, whole.weights[:, rows])


def test_without_bias_correction_there_are_no_shifts(
    conv_graph: fx.GraphModule, images: list[Tensor]
) -> None:
    prepared = insert_quantizers(conv_graph, get_target("reference").rules)
    graph = calibrate(prepared, images, bias_correction=False, progress=False)
    layer = state_of(graph).groups[0].layers[0]
    assert weight_changes(graph, layer).shifts is None
