from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

import fxmpq
from fxmpq.calibration.calibrate import calibrate
from fxmpq.errors import FxmpqError
from fxmpq.formats import Precision
from fxmpq.graph.attributes import get_tensor
from fxmpq.graph.legality.stages import check_stage
from fxmpq.graph.prepare import insert_quantizers
from fxmpq.graph.rules import TargetRules
from fxmpq.graph.state import copy_graph, require
from fxmpq.graph.switch import with_choices
from fxmpq.graph.trace import trace
from fxmpq.quantizers.modules import BiasCorrection, WeightQuantizer
from fxmpq.quantizers.planned import PlannedQuantizer
from fxmpq.training.freeze import freeze
from fxmpq.training.planned import LearnedShift, check_planned, float_copy, trainable_plan
from fxmpq.training.trainable import clamp_steps

Planned = Callable[..., fx.GraphModule]


PRECISIONS = [Precision(2, 8), Precision(4, 4), Precision(8), Precision()]


@pytest.fixture(scope="module")
def shared(
    calibrated: Planned, uniform: Planned, tied_model: nn.Module, ids: Tensor
) -> fx.GraphModule:
    return uniform(calibrated(trace(tied_model, ids), [ids]))


@pytest.mark.parametrize("target", ["reference", "onnxruntime"])
def test_it_begins_with_what_the_plan_computes(
    calibrated: Planned,
    conv_graph: fx.GraphModule,
    images: list[Tensor],
    in_turn: Planned,
    target: str,
) -> None:
    candidates = PRECISIONS if target == "reference" else None
    planned = in_turn(calibrated(conv_graph, images, target, candidates=candidates))
    learning = trainable_plan(planned).train()
    check_stage(learning, "trainable")
    for batch in images:
        # Bit for bit: a shift that is added to the bias beforehand is the same addition.
        assert torch.equal(learning(batch), planned(batch))
    assert require(learning, stage="calibrated") == require(planned, stage="calibrated")
    assert not torch.equal(planned(images[0]), conv_graph(images[0]))


def test_bert_keeps_its_call_and_its_output_class(
    calibrated: Planned,
    uniform: Planned,
    bert_graph: fx.GraphModule,
    token_batches: list[dict[str, Tensor]],
) -> None:
    planned = uniform(calibrated(bert_graph, token_batches))
    learning = trainable_plan(planned)
    found, expected = learning(**token_batches[1]), planned(**token_batches[1])
    assert type(found) is type(expected)
    assert torch.equal(found.logits, expected.logits)


def test_every_parameter_learns_and_none_is_the_graphs(
    calibrated: Planned, conv_graph: fx.GraphModule, images: list[Tensor], in_turn: Planned
) -> None:
    """As training in several processes wants it: each parameter is in each pass."""
    planned = in_turn(calibrated(conv_graph, images, candidates=PRECISIONS))
    before = {name: tensor.clone() for name, tensor in planned.state_dict().items()}
    learning = trainable_plan(planned)
    learning(images[0]).square().sum().backward()
    for name, parameter in learning.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name
    torch.optim.SGD(learning.parameters(), 0.1).step()
    after = planned.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_what_the_plan_leaves_in_float_has_no_steps(
    calibrated: Planned, conv_graph: fx.GraphModule, images: list[Tensor]
) -> None:
    graph = calibrated(conv_graph, images, candidates=PRECISIONS)
    groups = require(graph, stage="calibrated").groups
    choices = {group.name: "fp32" for group in groups} | {"conv2": "w4a4"}
    learning = trainable_plan(with_choices(graph, choices))
    steps = [
        name for name, module in learning.named_modules() if isinstance(module, PlannedQuantizer)
    ]
    [group] = [group for group in groups if group.name == "conv2"]
    assert sorted(steps) == sorted(
        [*group.activation_quantizers, *(str(layer.weight_quantizer) for layer in group.layers)]
    )


def test_a_shift_becomes_part_of_its_layers_own_bias(
    calibrated: Planned, uniform: Planned, conv_graph: fx.GraphModule, images: list[Tensor]
) -> None:
    planned = uniform(calibrated(conv_graph, images))
    learning = trainable_plan(planned)
    layers = [
        layer for group in require(planned, stage="calibrated").groups for layer in group.layers
    ]
    for layer in layers:
        correction = planned.get_submodule(str(layer.bias_correction))
        assert isinstance(correction, BiasCorrection)
        assert correction.active is not None
        shift = correction.shift(correction.active)
        assert shift is not None
        assert shift.any()
        bias = layer.weight.removesuffix("weight") + "bias"
        expected = get_tensor(planned, bias) + shift
        assert torch.equal(get_tensor(learning, bias), expected)


def test_a_shared_bias_and_a_missing_one_have_shifts_that_learn(
    shared: fx.GraphModule, ids: Tensor
) -> None:
    learning = trainable_plan(shared)
    assert torch.equal(learning(ids), shared(ids))
    shifts = [module for module in learning.modules() if isinstance(module, LearnedShift)]
    assert len(shifts) == 3  # two calls of mix, and out
    learning(ids).square().sum().backward()
    assert all(parameter.grad is not None for parameter in learning.parameters())


def test_a_layer_without_bias_and_correction_gets_one_that_begins_at_zero(
    uniform: Planned, tied_model: nn.Module, ids: Tensor
) -> None:
    graph = fxmpq.prepare(trace(tied_model, ids), "reference", candidates=["w4a8"])
    planned = uniform(fxmpq.calibrate(graph, [ids], bias_correction=False, progress=False))
    learning = trainable_plan(planned)
    assert torch.equal(learning(ids), planned(ids))
    shifts = [module for module in learning.modules() if isinstance(module, LearnedShift)]
    assert shifts
    assert not any(module.shift.any() for module in shifts)


@pytest.mark.parametrize("names", [["w3a8"], ["we2m1a8"], ["w3b4a8"]])
def test_a_weight_begins_where_its_codes_are(
    names: list[str],
    calibrated: Planned,
    uniform: Planned,
    conv_graph: fx.GraphModule,
    images: list[Tensor],
) -> None:
    candidates = [Precision.parse(name) for name in names]
    nearest = uniform(calibrated(conv_graph, images, candidates=candidates))
    rounded = uniform(nearest)
    layers = [
        layer for group in require(rounded, stage="calibrated").groups for layer in group.layers
    ]
    *moved, kept = layers
    for layer in layers:
        quantizer = rounded.get_submodule(str(layer.weight_quantizer))
        assert isinstance(quantizer, WeightQuantizer)
        assert quantizer.active is not None
        codes = quantizer.codes(get_tensor(rounded, layer.weight), quantizer.active)
        quantizer.set_codes(quantizer.active, codes if layer is kept else codes.flip(0))
    learning = trainable_plan(rounded)
    assert not torch.equal(rounded(images[0]), nearest(images[0]))
    assert torch.equal(learning(images[0]), rounded(images[0]))
    # Nearest codes say nothing that the weight does not.
    assert torch.equal(get_tensor(learning, kept.weight), get_tensor(rounded, kept.weight))
    for layer in moved:
        weight = get_tensor(learning, layer.weight)
        assert weight.requires_grad
        assert not torch.equal(weight, get_tensor(rounded, layer.weight))


def test_steps_are_clamped_with_all_others(
    calibrated: Planned, uniform: Planned, conv_graph: fx.GraphModule, images: list[Tensor]
) -> None:
    learning = trainable_plan(uniform(calibrated(conv_graph, images)))
    quantizers = [module for module in learning.modules() if isinstance(module, PlannedQuantizer)]
    with torch.no_grad():
        for quantizer in quantizers:
            quantizer.ratio.fill_(-1)
    clamp_steps(learning)
    assert all(float(quantizer.step.min()) > 0 for quantizer in quantizers)


def test_it_can_be_made_inside_inference_mode(
    calibrated: Planned, uniform: Planned, conv_graph: fx.GraphModule, images: list[Tensor]
) -> None:
    planned = uniform(calibrated(conv_graph, images))
    with torch.inference_mode():
        learning, teacher = trainable_plan(planned), float_copy(planned)
    learning(images[0]).sum().backward()
    assert not any(parameter.is_inference() for parameter in learning.parameters())
    assert not any(parameter.is_inference() for parameter in teacher.parameters())


def test_the_float_copy_has_parameters_of_its_own(
    calibrated: Planned, uniform: Planned, conv_graph: fx.GraphModule, images: list[Tensor]
) -> None:
    planned = uniform(calibrated(conv_graph, images))
    copied = float_copy(planned)
    assert torch.equal(copied(images[0]), conv_graph(images[0]))
    taken = {tensor.data_ptr() for tensor in planned.parameters()}
    assert not any(tensor.data_ptr() in taken for tensor in copied.parameters())
    assert not any(parameter.requires_grad for parameter in copied.parameters())


def test_a_graph_without_a_plan_is_refused(
    calibrated: Planned, conv_graph: fx.GraphModule, images: list[Tensor]
) -> None:
    graph = calibrated(conv_graph, images)
    for use in (check_planned, trainable_plan):
        with pytest.raises(FxmpqError, match="no plan to train"):
            use(graph)
        with pytest.raises(FxmpqError, match="fxmpq.prepare"):
            use(conv_graph)


def test_tensors_of_one_range_learn_one_step(
    conv_graph: fx.GraphModule, images: list[Tensor], chip_rules: TargetRules
) -> None:
    prepared = insert_quantizers(conv_graph, chip_rules)
    graph = calibrate(prepared, images, progress=False)
    groups = require(graph, stage="calibrated").groups
    planned = with_choices(graph, {group.name: "w4a8" for group in groups})
    learning = trainable_plan(planned)
    ((one, other),) = require(planned, stage="calibrated").shared_ranges
    assert learning.get_submodule(one) is learning.get_submodule(other)
    assert torch.equal(learning(images[0]), planned(images[0]))
    learning(images[0]).square().sum().backward()
    learned = learning.get_submodule(one)
    assert isinstance(learned, PlannedQuantizer)
    with torch.no_grad():
        learned.ratio.mul_(1.5)
    frozen = copy_graph(planned)
    freeze(learning, frozen)
    found = [frozen.get_submodule(name).ranges for name in (one, other)]
    assert found[0] == found[1]
    assert found[0] != planned.get_submodule(one).ranges
    assert torch.equal(frozen(images[0]), learning(images[0]))
