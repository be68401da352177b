from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

from fxmpq.errors import FxmpqError, PrecisionError
from fxmpq.formats import NumberFormat, Precision, Scheme
from fxmpq.graph.attributes import get_tensor
from fxmpq.graph.batches import call_arguments
from fxmpq.graph.run import float_outputs
from fxmpq.graph.state import require
from fxmpq.graph.trace import trace
from fxmpq.quantizers.learned import LearnedQuantizer, learned_round, weight_step
from fxmpq.quantizers.modules import ActivationQuantizer, BiasCorrection, WeightQuantizer
from fxmpq.training.trainable import (
    activate,
    begin_steps,
    clamp_steps,
    group_quantizers,
    learned_quantizers,
    switch_off,
    tensor_powers,
    trainable,
)

Planned = Callable[..., fx.GraphModule]
W4A8, W4 = Precision(4, 8), Precision(4)


def outputs(graph: fx.GraphModule, batch: object) -> list[Tensor]:
    args, kwargs = call_arguments(batch)
    return float_outputs(graph(*args, **kwargs))


def assert_same(graph: fx.GraphModule, other: fx.GraphModule, batch: object) -> None:
    pairs = zip(outputs(graph, batch), outputs(other, batch), strict=True)
    assert all(torch.equal(found, expected) for found, expected in pairs)


@pytest.mark.parametrize("target", ["reference", "onnxruntime"])
def test_off_it_computes_what_the_graph_does_to_the_last_bit(
    calibrated: Planned, conv_graph: fx.GraphModule, images: list[Tensor], target: str
) -> None:
    graph = calibrated(conv_graph, images, target)
    assert_same(trainable(graph), conv_graph, images[0])
    assert_same(trainable(graph).train(), conv_graph, images[1])


def test_bert_keeps_its_call_and_its_output_class(
    calibrated: Planned, bert_graph: fx.GraphModule, token_batches: list[dict[str, Tensor]]
) -> None:
    copied = trainable(calibrated(bert_graph, token_batches))
    assert_same(copied, bert_graph, token_batches[1])
    found, expected = copied(**token_batches[0]), bert_graph(**token_batches[0])
    assert type(found) is type(expected)
    assert torch.equal(found.logits, expected.logits)


def test_an_applied_plan_is_switched_off(
    calibrated: Planned, uniform: Planned, conv_graph: fx.GraphModule, images: list[Tensor]
) -> None:
    planned = uniform(calibrated(conv_graph, images))
    copied = trainable(planned)
    assert_same(copied, conv_graph, images[0])
    assert require(copied, stage="calibrated").choices == {}
    assert require(planned, stage="calibrated").choices != {}


def test_every_parameter_is_a_leaf_of_its_own(
    calibrated: Planned, conv_graph: fx.GraphModule, images: list[Tensor]
) -> None:
    graph = calibrated(conv_graph, images)
    frozen = [parameter.requires_grad for parameter in graph.parameters()]
    before = {name: tensor.clone() for name, tensor in graph.state_dict().items()}
    copied = trainable(graph)
    taken = {tensor.data_ptr() for tensor in graph.state_dict().values()}
    for parameter in copied.parameters():
        assert parameter.requires_grad
        assert parameter.is_leaf
        assert parameter.data_ptr() not in taken
        with torch.no_grad():
            parameter.add_(1)
    assert all(torch.equal(before[name], tensor) for name, tensor in graph.state_dict().items())
    assert [parameter.requires_grad for parameter in graph.parameters()] == frozen
    kinds = {type(m) for name, m in graph.named_modules() if name.startswith("quantizers.")}
    assert kinds == {ActivationQuantizer, WeightQuantizer, BiasCorrection}


@pytest.fixture(scope="module")
def tied(calibrated: Planned, tied_model: nn.Module, ids: Tensor) -> fx.GraphModule:
    graph = trace(tied_model, ids)
    return calibrated(graph, [ids], candidates=[Precision(2, 4), W4A8, Precision(8, 8)])


def test_a_shared_weight_stays_shared(tied: fx.GraphModule, ids: Tensor) -> None:
    copied = trainable(tied)
    names = {name for name, _ in copied.named_parameters() if not name.startswith("quantizers.")}
    assert names == {"embed.weight", "mix.weight", "mix.bias"}
    weights = [name for name in learned_quantizers(copied) if "weight" in name]
    assert len(weights) == 2
    copied(ids).sum().backward()
    assert all(
        parameter.grad is not None
        for name, parameter in copied.named_parameters()
        if not name.startswith("quantizers.")
    )


def test_tensors_that_go_below_zero_keep_their_zero_point(tied: fx.GraphModule) -> None:
    copied = trainable(tied)
    uint8 = NumberFormat(8, Scheme.AFFINE)
    lows = {}
    for name, quantizer in learned_quantizers(copied).items():
        if "activation" not in name:
            continue
        found = tied.get_submodule(name)
        assert isinstance(found, ActivationQuantizer)
        zero_point = found.ranges["uint8"].zero_point
        assert quantizer.levels[uint8] == (-zero_point, 255 - zero_point)
        assert float(quantizer.step(uint8).detach()) == pytest.approx(found.ranges["uint8"].scale)
        lows[quantizer.name.split(" ")[0]] = -zero_point
    assert lows["relu"] == 0
    assert lows["gelu"] < 0


def test_a_precision_is_simulated_with_the_steps_of_its_formats(
    calibrated: Planned, conv_graph: fx.GraphModule, images: list[Tensor]
) -> None:
    graph = calibrated(conv_graph, images, candidates=[W4, W4A8])
    copied = trainable(graph)
    group = require(copied, stage="calibrated").group("fc")
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    for name, quantizer, _ in group_quantizers(copied, group):
        quantizer.register_forward_hook(
            lambda _, inputs, output, name=name: seen.update({name: (inputs[0], output)})
        )
    activate(copied, group, W4A8)
    exact, lowered = outputs(graph, images[0])[0], outputs(copied, images[0])[0]
    assert not torch.equal(exact, lowered)
    for name, quantizer, is_activation in group_quantizers(copied, group):
        number_format = W4A8.activation if is_activation else W4A8.weight
        assert number_format is not None
        step, limits = quantizer.step(number_format), quantizer.levels[number_format]
        x, found = seen[name]
        assert torch.equal(found, learned_round(x, step, *limits))
        assert not torch.equal(found, x)
    activate(copied, group, W4)
    active = {flag: q.active for _, q, flag in group_quantizers(copied, group)}
    assert active == {True: None, False: NumberFormat(4)}
    activate(copied, group, Precision())
    assert_same(copied, graph, images[0])


def test_switching_off_reaches_every_group(
    calibrated: Planned, conv_graph: fx.GraphModule, images: list[Tensor]
) -> None:
    copied = trainable(calibrated(conv_graph, images, candidates=[W4A8]))
    for group in require(copied, stage="calibrated").groups:
        activate(copied, group, W4A8)
    assert not torch.equal(outputs(copied, images[0])[0], outputs(conv_graph, images[0])[0])
    switch_off(copied)
    assert_same(copied, conv_graph, images[0])


def test_steps_begin_at_the_weights_and_at_what_reaches_the_quantizers(
    tied: fx.GraphModule, ids: Tensor
) -> None:
    copied = trainable(tied)
    mix = require(copied, stage="calibrated").group("mix")
    with torch.no_grad():
        for name, parameter in copied.named_parameters():
            if name.startswith("quantizers."):
                parameter.fill_(0.123)
            else:
                parameter.mul_(1.5)
    begin_steps(copied, [mix], lambda: copied(ids))
    hidden = nn.functional.embedding(ids, copied.embed.weight).relu()
    between = nn.functional.gelu(nn.functional.linear(hidden, copied.mix.weight, copied.mix.bias))
    read = {"relu": hidden, "gelu": between}
    touched = {id(quantizer) for _, quantizer, _ in group_quantizers(copied, mix)}
    for _, quantizer, is_activation in group_quantizers(copied, mix):
        for number_format in quantizer.formats:
            found = float(quantizer.step(number_format).detach())
            if is_activation:
                x = read[quantizer.name.split(" ")[0]]
                low, high = quantizer.levels[number_format]
                expected = 2 * float(x.abs().mean().detach()) / math.sqrt(max(high, -low - 1))
            else:
                expected = weight_step(get_tensor(copied, "mix.weight"), number_format)
            assert found == pytest.approx(expected, rel=1e-5)
    for quantizer in learned_quantizers(copied).values():
        for parameter in quantizer.parameters() if id(quantizer) not in touched else ():
            assert float(parameter.detach()) == pytest.approx(0.123)


def test_powers_are_mean_squares(tied: fx.GraphModule, ids: Tensor) -> None:
    copied = trainable(tied)
    found = tensor_powers(copied, lambda: copied(ids))
    assert list(found) == list(learned_quantizers(copied))
    weight = get_tensor(copied, "mix.weight").detach()
    by_name = {learned_quantizers(copied)[name].name: power for name, power in found.items()}
    assert by_name["mix.weight"] == pytest.approx(float(weight.square().mean()))
    hidden = nn.functional.embedding(ids, copied.embed.weight).relu().detach()
    relu = next(power for name, power in by_name.items() if name.startswith("relu "))
    assert relu == pytest.approx(float(hidden.square().mean()))
    assert not any(q._forward_pre_hooks for q in learned_quantizers(copied).values())


def test_all_steps_are_clamped(tied: fx.GraphModule) -> None:
    copied = trainable(tied)
    quantizers = learned_quantizers(copied).values()
    with torch.no_grad():
        for quantizer in quantizers:
            for step in quantizer.parameters():
                step.fill_(-1)
    clamp_steps(copied)
    assert all(float(q.step(f).detach()) > 0 for q in quantizers for f in q.formats)


def test_a_graph_with_excluded_layers_has_fewer_quantizers(
    calibrated: Planned, conv_graph: fx.GraphModule, images: list[Tensor]
) -> None:
    copied = trainable(calibrated(conv_graph, images, exclude=["fc"]))
    group = require(copied, stage="calibrated").group("fc")
    assert list(group_quantizers(copied, group)) == []
    activate(copied, group, Precision())
    assert all(isinstance(q, LearnedQuantizer) for q in learned_quantizers(copied).values())
    assert_same(copied, conv_graph, images[0])


def test_it_can_be_made_inside_inference_mode(
    calibrated: Planned, conv_graph: fx.GraphModule, images: list[Tensor]
) -> None:
    graph = calibrated(conv_graph, images)
    with torch.inference_mode():
        copied = trainable(graph)
    copied(images[0]).sum().backward()
    assert not any(parameter.is_inference() for parameter in copied.parameters())


def test_a_graph_that_is_not_calibrated_is_an_error(conv_graph: fx.GraphModule) -> None:
    with pytest.raises(FxmpqError, match="fxmpq.prepare"):
        trainable(conv_graph)


@pytest.mark.parametrize("name", ["w4b4a8", "we4m3a8", "w8ae4m3", "we2m1"])
def test_formats_without_a_single_step_are_refused(
    calibrated: Planned, conv_graph: fx.GraphModule, images: list[Tensor], name: str
) -> None:
    candidates = [Precision.parse(found) for found in ("w4a8", name)]
    graph = calibrated(conv_graph, images, candidates=candidates)
    with pytest.raises(PrecisionError, match=f"candidate {name} of group 'stem.0'.*'w4ta8'"):
        trainable(graph)


def test_dynamic_ranges_are_refused(calibrated: Planned) -> None:
    batch = torch.ones(2, 3)
    candidates = [Precision.parse(found) for found in ("w4a8", "w4a8d")]
    graph = calibrated(trace(nn.Linear(3, 2), batch), [batch], candidates=candidates)
    with pytest.raises(PrecisionError, match="candidate w4a8d .* of dynamic ranges do not have"):
        trainable(graph)


def test_one_scale_per_tensor_trains(
    calibrated: Planned, conv_graph: fx.GraphModule, images: list[Tensor]
) -> None:
    copied = trainable(calibrated(conv_graph, images, candidates=[Precision.parse("w4ta8")]))
    assert_same(copied, conv_graph, images[0])
    for group in require(copied, stage="calibrated").groups:
        activate(copied, group, Precision.parse("w4ta8"))
    copied(images[0]).sum().backward()
    step = copied.get_parameter("quantizers.weight_fc_weight.steps.int4t")
    assert step.grad is not None
    assert float(step.grad) != 0


def test_steps_cannot_begin_without_a_run(tied: fx.GraphModule) -> None:
    """As with a loss that never calls the model."""
    copied = trainable(tied)
    groups = require(copied, stage="calibrated").groups
    with pytest.raises(FxmpqError, match="without running the model"):
        begin_steps(copied, groups, lambda: None)
    with pytest.raises(FxmpqError, match="without running the model"):
        tensor_powers(copied, lambda: None)
