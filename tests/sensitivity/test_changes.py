from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx

from fxmpq.calibration.calibrate import calibrate
from fxmpq.formats import Precision
from fxmpq.graph.prepare import insert_quantizers
from fxmpq.graph.state import state_of
from fxmpq.quantizers.modules import WeightQuantizer
from fxmpq.sensitivity.changes import weight_changes
from fxmpq.targets.registry import get_target

Planned = Callable[..., fx.GraphModule]
MIXED = [
    Precision.parse(name) for name in ("w4b5a8", "w4ta8", "we4m3ae4m3", "we2m1b16a8", "we2m1b32a8")
]


def test_changes_are_rounded_minus_float(
    conv_graph: fx.GraphModule, images: list[Tensor], calibrated: Planned
) -> None:
    graph = calibrated(conv_graph, images)
    for group in state_of(graph).groups:
        for layer in group.layers:
            found = weight_changes(graph, layer)
            weight = graph.get_parameter(layer.weight)
            assert tuple(entry.bits for entry in found.formats) == (2, 3, 4, 6, 8)
            assert found.weights.shape == (5, *weight.shape)
            scale = graph.get_submodule(str(layer.weight_quantizer)).get_buffer("scale_int8")
            steps = (found.weights[-1] + weight).flatten(1) / scale[:, None]
            torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-3)
            sizes = found.weights.flatten(1).norm(dim=1)
            assert (sizes[:-1] > sizes[1:]).all()
            assert found.shifts is not None
            assert found.shifts.shape == (5, len(weight))


@pytest.mark.parametrize("candidates", [None, MIXED])
def test_changes_equal_the_quantizers_to_the_last_bit(
    bert_graph: fx.GraphModule,
    token_batches: list[dict[str, Tensor]],
    calibrated: Planned,
    candidates: list[Precision] | None,
) -> None:
    graph = calibrated(bert_graph, token_batches, candidates=candidates)
    for layer in (layer for group in state_of(graph).groups for layer in group.layers):
        quantizer = graph.get_submodule(str(layer.weight_quantizer))
        assert isinstance(quantizer, WeightQuantizer)
        weight = graph.get_parameter(layer.weight).detach()
        found = weight_changes(graph, layer)
        for number_format, change in zip(found.formats, found.weights, strict=True):
            assert torch.equal(change, quantizer.quantize(weight, number_format) - weight)


def test_stored_codes_count_instead_of_the_nearest(
    bert_graph: fx.GraphModule, token_batches: list[dict[str, Tensor]], calibrated: Planned
) -> None:
    graph = calibrated(bert_graph, token_batches, candidates=MIXED)
    layer = state_of(graph).groups[-1].layers[0]
    quantizer = graph.get_submodule(str(layer.weight_quantizer))
    assert isinstance(quantizer, WeightQuantizer)
    weight, rows = graph.get_parameter(layer.weight).detach(), torch.tensor([2, 0])
    for number_format in quantizer.formats:
        quantizer.set_codes(number_format, quantizer.codes(weight, number_format).flip(1))
    found, some = weight_changes(graph, layer), weight_changes(graph, layer, rows)
    assert torch.equal(some.weights, found.weights[:, rows])
    for number_format, change in zip(found.formats, found.weights, strict=True):
        assert torch.equal(change, quantizer.quantize(weight, number_format) - weight)


@pytest.mark.parametrize("name", ["bert.embeddings.word_embeddings", "classifier"])
@pytest.mark.parametrize("candidates", [None, MIXED])
def test_changes_of_some_rows(
    candidates: list[Precision] | None,
    name: str,
    bert_graph: fx.GraphModule,
    token_batches: list[dict[str, Tensor]],
    calibrated: Planned,
) -> None:
    graph = calibrated(bert_graph, token_batches, candidates=candidates)
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
