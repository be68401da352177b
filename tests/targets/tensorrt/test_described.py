from __future__ import annotations

import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from fxmpq.formats import Precision
from fxmpq.graph.prepare import insert_quantizers
from fxmpq.graph.state import Layer, Product
from fxmpq.graph.trace import trace
from fxmpq.targets.onnxruntime.layer_nodes import WrittenModel
from fxmpq.targets.tensorrt import TENSORRT
from fxmpq.targets.tensorrt.described import DescribedLayers


def described(*nodes: onnx.NodeProto) -> DescribedLayers:
    """Of a file for one linear layer, with these nodes."""
    net = nn.Sequential(nn.Linear(4, 2))
    graph = insert_quantizers(trace(net, torch.randn(2, 4)), TENSORRT.rules)
    stored = {"codes": torch.zeros(4, 2, dtype=torch.int8), "scale_0_weight": torch.ones(2)}
    initializers = [numpy_helper.from_array(v.numpy(), name) for name, v in stored.items()]
    x = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 4])]
    model = helper.make_model(helper.make_graph(nodes, "g", x, [], initializers))
    return DescribedLayers(graph, WrittenModel(model))


LAYER = Layer("0", "linear", "linear", "0.weight", 8, (2, 4), 0)
DEQUANTIZE = helper.make_node("DequantizeLinear", ["codes", "scale_0_weight"], ["w"], axis=1)
ROUND_TRIP = [
    helper.make_node("QuantizeLinear", ["x", "one", "zero"], ["q"]),
    helper.make_node("DequantizeLinear", ["q", "one", "zero"], ["real"]),
]


@pytest.mark.parametrize(
    ("nodes", "precision", "reason"),
    [
        ([*ROUND_TRIP, DEQUANTIZE, helper.make_node("MatMul", ["real", "w"], ["y"])], "w8a8", ""),
        ([DEQUANTIZE, helper.make_node("MatMul", ["x", "w"], ["y"])], "w4b64", ""),
        (
            [DEQUANTIZE, helper.make_node("MatMul", ["x", "w"], ["y"])],
            "w8a8",
            "its input is not dequantized right before it",
        ),
        (
            [
                *ROUND_TRIP,
                DEQUANTIZE,
                helper.make_node("Neg", ["w"], ["v"]),
                helper.make_node("MatMul", ["real", "v"], ["y"]),
            ],
            "w8a8",
            "its weight is not dequantized right before it",
        ),
        ([helper.make_node("Neg", ["x"], ["y"])], "w8a8", "it is not found in the file as one"),
    ],
)
def test_what_stands_before_a_layer_is_read_from_the_file(
    nodes: list[onnx.NodeProto], precision: str, reason: str
) -> None:
    _, found = described(*nodes)(LAYER, Precision.parse(precision))
    assert found.startswith(reason)
    assert bool(found) == bool(reason)


@pytest.mark.parametrize(
    ("precision", "words"),
    [
        ("w8a8", "linear of int8 and int8"),
        ("we4m3tae4m3", "linear of e4m3 and e4m3"),
        ("w4b128", "linear of float and int4 in blocks of 128"),
    ],
)
def test_formats_are_named_and_nothing_is_said_to_run(precision: str, words: str) -> None:
    text, _ = described()(LAYER, Precision.parse(precision))
    assert text == f"{words}: written for TensorRT, not run on it"


def test_both_operands_of_a_product_have_one_format() -> None:
    found = described()(Product("scores", "matmul", 4), Precision.parse("a8"))
    assert found == ("matmul of int8 and int8: written for TensorRT, not run on it", "")
