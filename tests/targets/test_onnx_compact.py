from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from fxmpq.targets.onnx_compact import compact
from fxmpq.targets.onnxruntime.session import OnnxModel

FEED = torch.randn(1, 2, 6, 6, generator=torch.Generator().manual_seed(0))


def node(operator: str, inputs: str, output: str, **attributes: object) -> onnx.NodeProto:
    made = helper.make_node(operator, inputs.split(), [output], f"node_{output}", **attributes)
    made.metadata_props.add(key="where", value="a long note")
    return made


def model_of(
    nodes: list[onnx.NodeProto], result_size: int, **stored: np.ndarray
) -> onnx.ModelProto:
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 2, size, size])
        for name, size in (("x", 6), ("y", result_size))
    ]
    initializers = [numpy_helper.from_array(value, name) for name, value in stored.items()]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], initializers)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=9)
    for entry in (proto, graph, graph.input[0], graph.initializer[0]):
        entry.metadata_props.add(key="where", value="a long note")
        entry.doc_string = "a long note"
    proto.graph.CopyFrom(graph)
    proto.graph.value_info.append(helper.make_tensor_value_info("relu", TensorProto.FLOAT, [1]))
    return proto


@pytest.fixture
def proto() -> onnx.ModelProto:
    return model_of(
        [
            node("QuantizeLinear", "x val_1 val_2", "codes", axis=1, saturate=1, block_size=0),
            node("DequantizeLinear", "codes val_1 val_2", "real", axis=1, block_size=0),
            node("DequantizeLinear", "codes_w scale_w", "weight", axis=0),
            node(
                "Conv",
                "real weight",
                "conv",
                auto_pad="NOTSET",
                dilations=[1, 1],
                group=1,
                kernel_shape=[3, 3],
                pads=[0, 0, 0, 0],
                strides=[1, 1],
            ),
            node("Relu", "conv", "relu"),
            node("MaxPool", "relu", "y", kernel_shape=[2, 2], strides=[2, 2], pads=[1, 1, 1, 1]),
        ],
        result_size=3,
        codes_w=np.arange(-18, 18).reshape(2, 2, 3, 3).astype(np.int8),
        scale_w=np.float32([0.1, 0.02]),
        val_1=np.float32(0.05),
        val_2=np.uint8(120),
    )


def run(proto: onnx.ModelProto) -> torch.Tensor:
    return OnnxModel(proto.SerializeToString())([FEED])[0]


def layers_of(proto: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    conv = next(entry for entry in proto.graph.node if entry.op_type == "Conv")
    return {"stage.conv": conv, "stage.conv#2": conv}


def test_the_model_computes_the_same_from_a_smaller_file(proto: onnx.ModelProto) -> None:
    before, size = run(proto), proto.ByteSize()
    compact(proto, layers_of(proto))
    onnx.checker.check_model(proto, full_check=True)
    assert torch.equal(run(proto), before)
    assert proto.ByteSize() < size / 2
    assert b"note" not in proto.SerializeToString()
    assert not proto.graph.value_info


def test_attributes_that_say_nothing_new_are_dropped(proto: onnx.ModelProto) -> None:
    compact(proto, {})
    found = [[entry.name for entry in node.attribute] for node in proto.graph.node]
    assert found == [[], [], ["axis"], ["kernel_shape"], [], ["kernel_shape", "pads", "strides"]]


def test_layers_keep_a_name_for_people(proto: onnx.ModelProto) -> None:
    compact(proto, layers_of(proto))
    # Two layers that are computed once have the first one's.
    assert [entry.name for entry in proto.graph.node] == ["", "", "", "stage.conv", "relu", "y"]


def test_a_name_that_a_layer_has_is_not_given_twice(proto: onnx.ModelProto) -> None:
    conv = layers_of(proto)["stage.conv"]
    compact(proto, {"relu": conv})
    assert [entry.name for entry in proto.graph.node][3:] == ["relu", "node_relu", "y"]


def test_stored_tensors_inputs_and_outputs_keep_their_names(proto: onnx.ModelProto) -> None:
    compact(proto, {})
    names = [entry.name for entry in proto.graph.initializer]
    assert names[:2] == ["codes_w", "scale_w"]
    assert all(name.isdigit() for name in names[2:])
    first, *_, last = proto.graph.node
    assert first.input[0] == "x"
    assert last.output[0] == "y"
    assert all(len(name) <= 2 for entry in proto.graph.node[:-1] for name in entry.output)


def test_numbers_are_not_taken_twice_and_inner_graphs_keep_what_they_read() -> None:
    def branch(operator: str) -> onnx.GraphProto:
        result = helper.make_tensor_value_info(operator, TensorProto.FLOAT, [1, 2, 6, 6])
        return helper.make_graph([node(operator, "shared", operator)], operator, [], [result])

    nodes = [
        node("Abs", "x", "shared"),
        node("Neg", "0", "other"),
        node("ReduceMax", "x", "largest", keepdims=0),
        node("Cast", "largest", "is_any", to=TensorProto.BOOL),
        node("If", "is_any", "chosen", then_branch=branch("Sqrt"), else_branch=branch("Neg")),
        node("Add", "chosen other", "y"),
    ]
    proto = model_of(nodes, result_size=6, **{"0": np.float32([[2.0]])})
    before = run(proto)
    compact(proto, {})
    onnx.checker.check_model(proto, full_check=True)
    assert torch.equal(run(proto), before)
    # What is computed of stored numbers alone has no name, and a number that is free.
    assert [entry.output[0] for entry in proto.graph.node[:3]] == ["shared", "1", "2"]
    assert [entry.name for entry in proto.graph.node[:2]] == ["shared", ""]
