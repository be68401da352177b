from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx

from fxmpq.graph.attributes import get_tensor
from fxmpq.graph.run import run_batch
from fxmpq.graph.state import copy_graph, require
from fxmpq.graph.switch import with_choices
from fxmpq.quantizers.modules import ActivationQuantizer, BiasCorrection, WeightQuantizer
from fxmpq.targets.lowering import finish, lower, quantizer_of, store_tensor

Made = Callable[..., fx.GraphModule]


@pytest.fixture(scope="module")
def graph(calibrated: Made, conv_graph: fx.GraphModule, images: list[Tensor]) -> fx.GraphModule:
    return calibrated(conv_graph, images, exclude=["conv2"])


@pytest.fixture(scope="module")
def planned(graph: fx.GraphModule, uniform: Made) -> fx.GraphModule:
    return uniform(graph)


def kinds(graph: fx.GraphModule) -> list[type]:
    found = (quantizer_of(graph, node) for node in graph.graph.nodes)
    return [type(module) for module in found if module is not None]


def test_lowering_changes_no_bit(planned: fx.GraphModule, images: list[Tensor]) -> None:
    for batch in images:
        assert torch.equal(run_batch(lower(planned), batch)[0], run_batch(planned, batch)[0])


def test_only_active_quantizers_are_left(planned: fx.GraphModule) -> None:
    lowered = lower(planned)
    assert BiasCorrection not in kinds(lowered)
    assert kinds(lowered).count(WeightQuantizer) == 4
    assert kinds(lowered).count(ActivationQuantizer) == 3
    called = {str(node.target) for node in lowered.graph.nodes if node.op == "call_module"}
    held = {
        name
        for name, module in lowered.named_modules()
        if isinstance(module, (WeightQuantizer, ActivationQuantizer, BiasCorrection))
    }
    assert held == called


def test_corrected_biases_are_stored(planned: fx.GraphModule) -> None:
    lowered = lower(planned)
    layer = require(planned, stage="calibrated").group("fc").layers[0]
    correction = planned.get_submodule(str(layer.bias_correction))
    assert isinstance(correction, BiasCorrection)
    stored = get_tensor(lowered, "corrected_bias_fc")
    assert torch.equal(stored, correction(get_tensor(planned, "fc.bias")))
    assert not hasattr(lowered.get_submodule("fc"), "bias")


def test_rounded_biases_are_stored(planned: fx.GraphModule) -> None:
    layer = require(planned, stage="calibrated").group("fc").layers[0]
    rounded = copy_graph(planned)
    correction = rounded.get_submodule(str(layer.bias_correction))
    assert isinstance(correction, BiasCorrection)
    bias = get_tensor(planned, "fc.bias")
    correction.set_rounding(torch.full_like(bias.detach(), 0.5))
    difference = get_tensor(lower(rounded), "corrected_bias_fc") - get_tensor(
        lower(planned), "corrected_bias_fc"
    )
    torch.testing.assert_close(difference, torch.full_like(difference, 0.5))


def test_an_all_float_plan_lowers_to_the_traced_graph(
    calibrated: Made, conv_graph: fx.GraphModule, images: list[Tensor]
) -> None:
    graph = calibrated(conv_graph, images, exclude=["*"])
    groups = require(graph, stage="calibrated").groups
    lowered = lower(with_choices(graph, {group.name: "fp32" for group in groups}))
    assert kinds(lowered) == []
    assert set(lowered.state_dict()) == set(conv_graph.state_dict())
    assert len(lowered.graph.nodes) == len(conv_graph.graph.nodes)


def test_a_graph_that_is_switched_off_lowers_to_float(
    graph: fx.GraphModule, conv_graph: fx.GraphModule, images: list[Tensor]
) -> None:
    lowered = lower(graph)
    assert kinds(lowered) == []
    assert torch.equal(run_batch(lowered, images[0])[0], run_batch(conv_graph, images[0])[0])


def test_the_planned_graph_is_left_alone(planned: fx.GraphModule) -> None:
    before, names = [str(node) for node in planned.graph.nodes], set(planned.state_dict())
    lower(planned)
    assert [str(node) for node in planned.graph.nodes] == before
    assert set(planned.state_dict()) == names


def test_tensors_are_stored_once_under_names_of_their_own(conv_graph: fx.GraphModule) -> None:
    graph = copy_graph(conv_graph)
    end = graph.graph.output_node()
    tensor = torch.arange(3.0)
    one = store_tensor(graph, "scale.a.b", tensor, end)
    again = store_tensor(graph, "scale.a_b", tensor.clone(), end)
    other = store_tensor(graph, "scale.a_b", tensor + 1, end)
    integers = store_tensor(graph, "scale.a_b", tensor.to(torch.int8), end)
    assert one.target == again.target == "scale_a_b"
    assert len({one.target, other.target, integers.target}) == 3
    assert torch.equal(get_tensor(graph, str(other.target)), tensor + 1)
    assert get_tensor(graph, str(integers.target)).dtype is torch.int8


def test_what_is_not_equal_to_itself_is_stored(conv_graph: fx.GraphModule) -> None:
    graph = copy_graph(conv_graph)
    tensor = torch.tensor([1.0, float("nan")])
    store_tensor(graph, "mask", tensor, graph.graph.output_node())
    assert get_tensor(graph, "mask").isnan().tolist() == [False, True]


def test_finishing_drops_what_no_node_reads(conv_graph: fx.GraphModule) -> None:
    graph = copy_graph(conv_graph)
    store_tensor(graph, "unused", torch.ones(3), graph.graph.output_node())
    graph.register_buffer("never_read", torch.ones(2))
    finish(graph)
    assert set(graph.state_dict()) == set(conv_graph.state_dict())


def test_what_is_no_module_call_has_no_quantizer(planned: fx.GraphModule) -> None:
    assert quantizer_of(planned, None) is None
    assert quantizer_of(planned, planned.graph.output_node()) is None
