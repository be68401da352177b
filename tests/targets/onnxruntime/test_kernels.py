from __future__ import annotations

from collections.abc import Callable

import onnx
import pytest
import torch
from onnx import helper
from torch import Tensor, fx, nn

from fxmpq.formats import Precision
from fxmpq.graph.state import Layer, Product
from fxmpq.graph.trace import trace
from fxmpq.targets.onnxruntime.kernels import ExecutedKernels
from fxmpq.targets.onnxruntime.layer_nodes import WrittenModel

Made = Callable[..., fx.GraphModule]

W4A8, W8A8, W4 = Precision(4, 8), Precision(8, 8), Precision(4)


def layer(weight: str, kind: str = "conv") -> Layer:
    return Layer(weight.removesuffix(".weight"), kind, "conv2d", weight, 0, (1,), 0)


def node(operator: str, inputs: str, output: str) -> onnx.NodeProto:
    return helper.make_node(operator, inputs.split(), [output])


def model_of(*nodes: onnx.NodeProto) -> onnx.ModelProto:
    return helper.make_model(helper.make_graph(list(nodes), "graph", [], []))


class Three(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(2, 2, 1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x)).relu())


@pytest.fixture(scope="module")
def planned(calibrated: Made, uniform: Made) -> fx.GraphModule:
    torch.manual_seed(0)
    x = torch.randn(2, 2, 4, 4)
    return uniform(calibrated(trace(Three(), x), [x], "onnxruntime", exclude=["*"]))


@pytest.fixture
def kernels(planned: fx.GraphModule) -> ExecutedKernels:
    """Weights that integer kernels read, that are dequantized, that an embedding shares, both."""
    executed = model_of(
        node("QLinearConv", "x scale_a_weight", "y"),
        node("QLinearConv", "y scale_a_weight", "z"),
        node("DequantizeLinear", "codes scale_b_weight", "w"),
        node("Conv", "x w", "v"),
        node("DequantizeLinear", "codes scale_c_weight", "u"),
        node("Conv", "x u", "t"),
        node("QLinearConv", "t scale_c_weight", "q"),
        node("Gather", "scale_t_weight i", "rows"),
        node("MatMulIntegerToFloat", "rows codes scale_t_weight", "logits"),
        node("MatMulNBits", "rows packed 7", "wide"),
    )
    # The file spreads the scales over blocks, and looks others up while it runs.
    written = model_of(
        node("Gather", "scale_n_weight columns", "7"),
        node("MatMulNBits", "rows packed 7", "wide"),
        node("Gather", "scale_t_weight i", "looked_up"),
        node("Mul", "rows looked_up", "real"),
    )
    for name in ("scale_n_weight", "columns", "packed", "scale_t_weight"):
        value = helper.make_tensor(name, onnx.TensorProto.FLOAT, [1], [1.0])
        written.graph.initializer.append(value)
    return ExecutedKernels(executed, WrittenModel(written), planned)


def test_integer_kernels_are_named_once(kernels: ExecutedKernels) -> None:
    assert kernels.quantized(layer("a.weight"), W8A8) == ("QLinearConv", "")


def test_codes_that_are_stored_narrower_than_they_run_have_a_reason(
    kernels: ExecutedKernels,
) -> None:
    kernel, reason = kernels.quantized(layer("a.weight"), W4A8)
    assert kernel == "QLinearConv"
    assert reason == "stored in 4 bits, widened to 8 when the file is loaded"
    assert kernels.quantized(layer("n.weight", "linear"), W4) == ("MatMulNBits", "")


def test_a_dequantized_weight_has_a_reason(kernels: ExecutedKernels) -> None:
    kernel, reason = kernels.quantized(layer("b.weight"), W4A8)
    assert kernel == "float Conv"
    assert "no integer kernel" in reason
    kernel, reason = kernels.quantized(layer("c.weight"), W4A8)
    assert kernel == "float Conv, QLinearConv"
    assert "no integer kernel" in reason


def test_a_shared_weight_is_looked_up_by_the_embedding_only(kernels: ExecutedKernels) -> None:
    assert kernels.quantized(layer("t.weight", "embedding"), W8A8) == ("Gather", "")
    assert kernels.quantized(layer("t.weight", "linear"), W8A8) == ("MatMulIntegerToFloat", "")


def test_what_vanished_has_a_reason(kernels: ExecutedKernels) -> None:
    for member in (layer("d.weight"), Product("scores", "matmul", 1)):
        kernel, reason = kernels.quantized(member, W4A8)
        assert kernel == "unknown"
        assert "does not show it" in reason


def test_float_kernels_are_found_by_what_they_compute(planned: fx.GraphModule) -> None:
    written = model_of(
        node("Conv", "x a.weight", "a"),
        node("Conv", "a b.weight", "b"),
        node("Relu", "b", "relu"),
        node("Conv", "relu c.weight", "c"),
    )
    for name in "abc":
        value = helper.make_tensor(f"{name}.weight", onnx.TensorProto.FLOAT, [1], [1.0])
        written.graph.initializer.append(value)
    executed = model_of(
        node("Conv", "x reordered", "a_blocked"),
        node("ReorderOutput", "a_blocked", "a"),
        node("FusedConv", "a b.weight", "relu"),
    )
    kernels = ExecutedKernels(executed, WrittenModel(written), planned)
    found = [kernels.in_float(layer(f"{name}.weight")) for name in "abcd"]
    assert found == ["float Conv", "float FusedConv", "float", "float"]


def test_a_float_layer_that_the_runtime_quantizes_is_told_by_its_name(
    planned: fx.GraphModule,
) -> None:
    written = model_of(helper.make_node("Conv", ["x", "a.weight"], ["a"], name="node_conv"))
    written.graph.initializer.append(
        helper.make_tensor("a.weight", onnx.TensorProto.FLOAT, [1], [1.0])
    )
    executed = model_of(
        helper.make_node("QLinearConv", ["x", "codes"], ["moved"], name="node_conv_token_12"),
        helper.make_node("Conv", ["x", "codes"], ["other"], name="node_conv_1"),
    )
    kernels = ExecutedKernels(executed, WrittenModel(written), planned)
    assert (
        kernels.in_float(layer("a.weight")) == "QLinearConv on weights that the runtime quantized"
    )


def test_a_layer_whose_name_ends_as_if_changed_is_not_taken_for_another(
    planned: fx.GraphModule,
) -> None:
    named = [("FusedConv", "a"), ("Conv", "a_token_1")]
    executed = model_of(
        *(helper.make_node(operator, ["x"], [f"{name}_"], name=name) for operator, name in named)
    )
    written = model_of(helper.make_node("Conv", ["x", "a.weight"], ["gone"], name="a"))
    written.graph.initializer.append(
        helper.make_tensor("a.weight", onnx.TensorProto.FLOAT, [1], [1.0])
    )
    kernels = ExecutedKernels(executed, WrittenModel(written), planned)
    assert kernels.in_float(layer("a.weight")) == "float FusedConv"
