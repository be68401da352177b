from __future__ import annotations

import onnx
import pytest
from onnx import helper

from fxmpq.formats import Precision
from fxmpq.graph.state import Layer
from fxmpq.targets.onnxruntime.kernels import kernel_rule

W4A8 = Precision(4, 8)


def layer(weight: str) -> Layer:
    return Layer("layer", "conv", "conv2d", weight, 0, (1,), 0)


@pytest.fixture
def executed() -> onnx.ModelProto:
    """Three weights: one read by integer kernels, one dequantized, one read by both."""
    nodes = [
        helper.make_node("QLinearConv", ["x", "scale_a_weight"], ["y"]),
        helper.make_node("Gather", ["scale_a_weight", "i"], ["s"]),
        helper.make_node("QLinearConv", ["y", "scale_a_weight"], ["z"]),
        helper.make_node("DequantizeLinear", ["codes", "scale_b_weight"], ["w"]),
        helper.make_node("Conv", ["x", "w"], ["v"]),
        helper.make_node("DequantizeLinear", ["codes", "scale_c_weight"], ["u"]),
        helper.make_node("Conv", ["x", "u"], ["t"]),
        helper.make_node("QLinearConv", ["t", "scale_c_weight"], ["q"]),
    ]
    return helper.make_model(helper.make_graph(nodes, "graph", [], []))


def test_integer_kernels_are_named_once(executed: onnx.ModelProto) -> None:
    assert kernel_rule(executed)(layer("a.weight"), W4A8) == ("QLinearConv, Gather", "")


def test_a_dequantized_weight_has_a_reason(executed: onnx.ModelProto) -> None:
    kernel, reason = kernel_rule(executed)(layer("b.weight"), W4A8)
    assert kernel == "float Conv"
    assert "no integer kernel" in reason
    kernel, reason = kernel_rule(executed)(layer("c.weight"), W4A8)
    assert kernel == "float Conv, QLinearConv"
    assert "no integer kernel" in reason


def test_a_weight_that_vanished_has_a_reason(executed: onnx.ModelProto) -> None:
    kernel, reason = kernel_rule(executed)(layer("d.weight"), W4A8)
    assert kernel == "unknown"
    assert "does not show it" in reason
