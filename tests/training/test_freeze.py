from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

import fxmpq
from fxmpq.formats import NumberFormat, Precision
from fxmpq.graph.attributes import get_tensor
from fxmpq.graph.run import float_outputs
from fxmpq.graph.state import copy_graph, require
from fxmpq.graph.trace import trace
from fxmpq.quantizers.modules import BiasCorrection, WeightQuantizer
from fxmpq.quantizers.weight_scale import mse_weight_scales
from fxmpq.training.freeze import freeze
from fxmpq.training.planned import float_copy, trainable_plan

Planned = Callable[..., fx.GraphModule]
PRECISIONS = [Precision(2, 8), Precision(4, 4), Precision(8), Precision()]
FLOATS = [Precision.parse(text) for text in ("we2m1b16ae5m2", "we4m3ae4m3", "w4b16a8", "w3ta8")]


def disturb(learning: fx.GraphModule, seed: int = 0) -> None:
    """Move everything that learns, as a training does."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in learning.parameters():
            factor = 1 + 0.1 * torch.randn(parameter.shape, generator=generator)
            parameter.mul_(factor).add_(0.01)


def frozen_of(learning: fx.GraphModule, planned: fx.GraphModule) -> fx.GraphModule:
    graph = copy_graph(planned)
    freeze(learning, graph)
    return graph


@pytest.mark.parametrize("candidates", [PRECISIONS, FLOATS], ids=["integers", "floats"])
def test_the_frozen_graph_computes_what_was_trained_to_the_last_bit(
    calibrated: Planned,
    in_turn: Planned,
    conv_graph: fx.GraphModule,
    images: list[Tensor],
    candidates: list[Precision],
) -> None:
    planned = in_turn(calibrated(conv_graph, images, candidates=candidates))
    before = planned(images[0])
    learning = trainable_plan(planned)
    disturb(learning)
    graph = frozen_of(learning, planned)
    for batch in images:
        assert torch.equal(graph(batch), learning(batch))
    assert not torch.equal(graph(images[0]), before)
    assert torch.equal(planned(images[0]), before)
    assert require(graph, stage="calibrated") == require(planned, stage="calibrated")


def test_shared_weights_and_biases_are_frozen_too(
    calibrated: Planned, in_turn: Planned, tied_model: nn.Module, ids: Tensor
) -> None:
    planned = in_turn(calibrated(trace(tied_model, ids), [ids], candidates=[Precision(4, 8)]))
    learning = trainable_plan(planned)
    disturb(learning)
    graph = frozen_of(learning, planned)
    assert torch.equal(graph(ids), learning(ids))
    assert not torch.equal(graph(ids), planned(ids))


def test_bert_is_frozen_bit_for_bit(
    calibrated: Planned,
    uniform: Planned,
    bert_graph: fx.GraphModule,
    token_batches: list[dict[str, Tensor]],
) -> None:
    planned = uniform(calibrated(bert_graph, token_batches), 1)
    learning = trainable_plan(planned)
    disturb(learning)
    graph = frozen_of(learning, planned)
    assert torch.equal(graph(**token_batches[1]).logits, learning(**token_batches[1]).logits)


@pytest.mark.parametrize("target", ["reference", "onnxruntime"])
def test_the_frozen_graph_converts(
    calibrated: Planned,
    in_turn: Planned,
    conv_graph: fx.GraphModule,
    images: list[Tensor],
    target: str,
    tmp_path: Path,
) -> None:
    planned = in_turn(calibrated(conv_graph, images, target))
    learning = trainable_plan(planned)
    disturb(learning)
    graph = frozen_of(learning, planned)
    converted = fxmpq.convert(
        graph, output=tmp_path / "model.onnx" if target != "reference" else None
    )
    [found] = converted.run(images[0])
    [expected] = float_outputs(learning(images[0]))
    if target == "reference":
        assert torch.equal(found, expected)
    else:
        error = (found - expected.detach()).square().sum() / expected.detach().square().sum()
        assert float(error) < 1e-3


def test_with_quantizers_off_it_is_the_trained_float_model(
    calibrated: Planned, uniform: Planned, conv_graph: fx.GraphModule, images: list[Tensor]
) -> None:
    planned = uniform(calibrated(conv_graph, images))
    learning = trainable_plan(planned)
    disturb(learning)
    graph = frozen_of(learning, planned)
    for group in require(graph, stage="calibrated").groups:
        for layer in group.layers:
            assert torch.equal(get_tensor(graph, layer.weight), get_tensor(learning, layer.weight))
    assert not torch.equal(float_copy(graph)(images[0]), conv_graph(images[0]))


def test_codes_are_stored_and_shifts_are_gone(
    calibrated: Planned, uniform: Planned, conv_graph: fx.GraphModule, images: list[Tensor]
) -> None:
    planned = uniform(calibrated(conv_graph, images))
    learning = trainable_plan(planned)
    disturb(learning)
    graph = frozen_of(learning, planned)
    for module in graph.modules():
        if isinstance(module, WeightQuantizer):
            assert module.active is not None
            assert module.stored_codes(module.active) is not None
        if isinstance(module, BiasCorrection):
            assert list(module.buffers()) == []


def test_formats_that_the_plan_does_not_use_begin_anew(
    calibrated: Planned, uniform: Planned, conv_graph: fx.GraphModule, images: list[Tensor]
) -> None:
    planned = uniform(calibrated(conv_graph, images))
    quantizer = planned.get_submodule("quantizers.weight_fc_weight")
    assert isinstance(quantizer, WeightQuantizer)
    other = NumberFormat(8)
    assert other in quantizer.formats
    quantizer.set_codes(other, torch.zeros(quantizer_shape(planned)))
    learning = trainable_plan(planned)
    disturb(learning)
    graph = frozen_of(learning, planned)
    found = graph.get_submodule("quantizers.weight_fc_weight")
    assert isinstance(found, WeightQuantizer)
    weight = get_tensor(graph, "fc.weight").detach()
    [expected] = mse_weight_scales(weight, [other], 0)
    assert torch.equal(found.scale(other), expected)
    assert found.stored_codes(other) is None
    assert quantizer.stored_codes(other) is not None


def quantizer_shape(graph: fx.GraphModule) -> torch.Size:
    return get_tensor(graph, "fc.weight").shape


def test_it_can_be_made_inside_inference_mode(
    calibrated: Planned, uniform: Planned, conv_graph: fx.GraphModule, images: list[Tensor]
) -> None:
    planned = uniform(calibrated(conv_graph, images))
    learning = trainable_plan(planned)
    graph = copy_graph(planned)
    with torch.inference_mode():
        freeze(learning, graph)
    assert not any(tensor.is_inference() for tensor in graph.state_dict().values())
    assert torch.equal(graph(images[0]), learning(images[0]))
