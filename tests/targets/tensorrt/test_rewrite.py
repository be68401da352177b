from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, fx, nn

from fxmpq.calibration.calibrate import calibrate
from fxmpq.errors import TargetError
from fxmpq.formats import Precision
from fxmpq.graph.prepare import insert_quantizers
from fxmpq.graph.run import run_batch
from fxmpq.graph.state import state_of
from fxmpq.graph.switch import with_choices
from fxmpq.graph.trace import trace
from fxmpq.targets.target import agreement_db
from fxmpq.targets.tensorrt import TENSORRT
from fxmpq.targets.tensorrt.rewrite import FOUR_BITS, to_symmetric_qdq

Made = Callable[..., fx.GraphModule]
own, aten = torch.ops.fxmpq, torch.ops.aten


def at(graph: fx.GraphModule, precision: str) -> fx.GraphModule:
    return with_choices(graph, {group.name: precision for group in state_of(graph).groups})


@pytest.mark.parametrize("precision", ["w8a8", "w8ta8", "we4m3tae4m3"])
def test_it_computes_what_the_simulation_does(
    calibrated: Made, conv_graph: fx.GraphModule, images: list[Tensor], precision: str
) -> None:
    graph = at(
        calibrated(conv_graph, images, target="tensorrt", candidates=[Precision.parse(precision)]),
        precision,
    )
    rewritten = to_symmetric_qdq(graph)
    assert not list(rewritten.graph.find_nodes(op="call_module"))
    assert agreement_db(run_batch(graph, images[1]), run_batch(rewritten, images[1])) > 110


def test_weights_in_blocks_lie_along_the_input(calibrated: Made) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 3, 128)
    graph = trace(nn.Sequential(nn.Linear(128, 6), nn.GELU(), nn.Linear(6, 2)), x)
    graph = calibrated(
        graph, [x], target="tensorrt", candidates=[Precision.parse("w4b64")], exclude=["2"]
    )
    planned = with_choices(graph, {"0": "w4b64", "2": "fp32"})
    rewritten = to_symmetric_qdq(planned)
    assert rewritten.get_buffer(f"{FOUR_BITS}0_weight").shape == (128, 6)
    assert rewritten.get_buffer("scale_0_weight").shape == (2, 6)
    assert agreement_db([planned(x)], [rewritten(x)]) > 110
    # Its input stays float, and so does the layer that was left out.
    assert not [n for n in rewritten.graph.nodes if n.target is own.symmetric_codes.default]
    assert len([n for n in rewritten.graph.nodes if n.target is aten.linear.default]) == 1


def test_layers_read_their_weights_with_nothing_in_between(
    calibrated: Made, conv_graph: fx.GraphModule, images: list[Tensor]
) -> None:
    graph = calibrated(conv_graph, images, target="tensorrt", candidates=[Precision.parse("w8a8")])
    rewritten = to_symmetric_qdq(at(graph, "w8a8"))
    layers = {aten.conv2d.default: 4, aten.matmul.default: 1}
    for target, count in layers.items():
        found = [node for node in rewritten.graph.nodes if node.target is target]
        assert len(found) == count
        for node in found:
            assert all(arg.target is own.symmetric_numbers.default for arg in node.args[:2])
            stored = node.args[1].args[0]
            assert stored.op == "get_attr"
            assert rewritten.get_buffer(stored.target).dtype is torch.int8
    # Biases are float, and of a convolution its own operand.
    for node in rewritten.graph.nodes:
        if node.target is aten.conv2d.default:
            bias = node.args[2]
            assert bias.op == "get_attr"
            assert getattr(rewritten, bias.target).dtype is torch.float32


def test_what_a_convolution_adds_is_quantized_and_its_own_result_is_not(
    calibrated: Made, conv_graph: fx.GraphModule, images: list[Tensor]
) -> None:
    graph = calibrated(conv_graph, images, target="tensorrt", candidates=[Precision.parse("w8a8")])
    rewritten = to_symmetric_qdq(at(graph, "w8a8"))
    (add,) = [
        node
        for node in rewritten.graph.nodes
        if node.target is aten.add.Tensor and node.args[1].op == "call_function"
    ]
    kinds = [arg.target for arg in add.args]
    assert sorted(map(str, kinds)) == ["aten.conv2d.default", "fxmpq.symmetric_numbers.default"]
    # Nor is anything between a convolution and its ReLU.
    for node in rewritten.graph.nodes:
        if node.target is aten.relu.default:
            assert node.args[0].target in (aten.conv2d.default, aten.add.Tensor)


def test_a_zero_point_is_refused(conv_graph: fx.GraphModule, images: list[Tensor]) -> None:
    rules = replace(TENSORRT.rules, symmetric_inputs_of=frozenset({"linear", "add"}))
    graph = insert_quantizers(conv_graph, rules, candidates=[*TENSORRT.rules.default_candidates])
    graph = at(calibrate(graph, images, progress=False), "w8a8")
    with pytest.raises(TargetError, match=r"^x \(stem\.0\) is stored with the zero point \d+"):
        to_symmetric_qdq(graph)
