from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from fxmpq.targets.onnxruntime.session import OnnxModel
from fxmpq.targets.onnxruntime.stored_weights import dequantize_when_loaded

CODES = np.random.default_rng(0).integers(-128, 128, (3, 4, 2)).astype(np.int8)


def model_of(axis: int, operator: str = "Add", *, twice: bool = False) -> onnx.ModelProto:
    """An operator that reads a dequantized weight."""
    scale = np.linspace(0.5, 2, CODES.shape[axis]).astype(np.float32)
    stored = {"codes": CODES, "scale": scale}
    nodes = [
        helper.make_node("DequantizeLinear", ["codes", "scale"], ["weight"], axis=axis),
        helper.make_node(operator, ["x", "weight"], ["y"]),
    ]
    if twice:
        nodes.append(helper.make_node("DequantizeLinear", ["codes", "scale"], ["w"], axis=axis))
        nodes.append(helper.make_node("Mul", ["y", "w"], ["z"]))
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, list(CODES.shape))
        for name in ("x", "z" if twice else "y")
    ]
    initializers = [numpy_helper.from_array(value, name) for name, value in stored.items()]
    graph = helper.make_graph(nodes, "graph", values[:1], values[1:], initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def rewritten(model: onnx.ModelProto) -> onnx.ModelProto:
    found = ir.from_proto(model)
    dequantize_when_loaded(found)
    proto = ir.to_proto(found)
    onnx.checker.check_model(proto)
    return proto


def result(model: onnx.ModelProto) -> np.ndarray:
    session = OnnxModel(model.SerializeToString()).session
    (found,) = session.run(None, {"x": np.ones(CODES.shape, np.float32)})
    return np.asarray(found)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("twice", [False, True])
def test_the_product_is_the_dequantized_weight(axis: int, *, twice: bool) -> None:
    model = model_of(axis, twice=twice)
    changed = rewritten(model)
    assert "DequantizeLinear" not in {node.op_type for node in changed.graph.node}
    np.testing.assert_array_equal(result(changed), result(model))


def test_the_runtime_folds_it() -> None:
    before = [
        node.op_type for node in OnnxModel(model_of(1).SerializeToString()).executed.graph.node
    ]
    loaded = OnnxModel(rewritten(model_of(1)).SerializeToString())
    assert before == ["DequantizeLinear", "Add"]
    assert [node.op_type for node in loaded.executed.graph.node] == ["Add"]


def test_what_integer_kernels_read_stays() -> None:
    """A convolution runs on integers if what it convolves is in codes too."""
    model = model_of(0, "Conv")
    folded = [node.op_type for node in rewritten(model).graph.node]
    assert folded == ["Unsqueeze", "Cast", "Mul", "Conv"]
    input_codes = helper.make_tensor_value_info("q", TensorProto.UINT8, list(CODES.shape))
    model.graph.input[0].CopyFrom(input_codes)
    dequantize = helper.make_node("DequantizeLinear", ["q", "step"], ["x"])
    model.graph.node.insert(0, dequantize)
    model.graph.initializer.append(numpy_helper.from_array(np.float32(0.1), "step"))
    kept = [node.op_type for node in rewritten(model).graph.node]
    assert kept == ["DequantizeLinear", "DequantizeLinear", "Conv"]


def test_activations_and_biases_stay() -> None:
    model = model_of(0)
    model.graph.node[0].input[0] = "x"
    model.graph.node[1].input[0] = "weight"
    assert "Mul" not in {node.op_type for node in rewritten(model).graph.node}
    model = model_of(0)
    bias = numpy_helper.from_array(CODES.astype(np.int32), "codes")
    model.graph.initializer[0].CopyFrom(bias)
    assert "Mul" not in {node.op_type for node in rewritten(model).graph.node}
