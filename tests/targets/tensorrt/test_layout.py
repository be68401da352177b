from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx import TensorProto, helper, numpy_helper

from fxmpq.targets.onnxruntime.session import OnnxModel
from fxmpq.targets.tensorrt.layout import dequantize_at_each_reader, store_four_bits


def model_of(nodes: list[onnx.NodeProto], **stored: np.ndarray) -> ir.Model:
    initializers = [numpy_helper.from_array(value, name) for name, value in stored.items()]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 3]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=9)
    return ir.from_proto(model)


def test_four_bits_are_two_a_byte_the_first_in_the_lower_half() -> None:
    codes = np.array([[1, -2, 7], [-8, 0, 3]], np.int8)
    nodes = [
        helper.make_node("DequantizeLinear", ["codes_4bit_w", "scale"], ["w"]),
        helper.make_node("Add", ["x", "w"], ["y"]),
    ]
    model = model_of(nodes, codes_4bit_w=codes, scale=np.float32(0.5), codes_v=codes)
    store_four_bits(model)
    proto = ir.to_proto(model)
    stored = {entry.name: entry for entry in proto.graph.initializer}
    assert stored["codes_4bit_w"].data_type == TensorProto.INT4
    assert stored["codes_4bit_w"].raw_data == bytes([0xE1, 0x87, 0x30])
    assert stored["codes_v"].data_type == TensorProto.INT8
    assert proto.ir_version == 10
    onnx.checker.check_model(proto, full_check=True)
    (found,) = OnnxModel(proto.SerializeToString(), optimized=False)([torch.zeros(2, 3)])
    assert found.tolist() == (codes * 0.5).tolist()


def test_a_file_without_them_stays_as_it_is() -> None:
    model = model_of([helper.make_node("Neg", ["x"], ["y"])], codes_v=np.int8([1]))
    before = ir.to_proto(model).SerializeToString()
    store_four_bits(model)
    dequantize_at_each_reader(model)
    assert ir.to_proto(model).SerializeToString() == before


def test_each_reader_has_a_dequantization_of_its_own() -> None:
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["codes"]),
        helper.make_node("DequantizeLinear", ["codes", "scale"], ["real"], axis=1),
        helper.make_node("Mul", ["real", "real"], ["square"]),
        helper.make_node("Add", ["square", "real"], ["y"]),
    ]
    model = model_of(nodes, scale=np.float32(0.5), zero=np.int8(0))
    dequantize_at_each_reader(model)
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    made = [node for node in proto.graph.node if node.op_type == "DequantizeLinear"]
    assert len(made) == 3
    assert {tuple(node.input) for node in made} == {("codes", "scale")}
    assert {node.attribute[0].i for node in made} == {1}
    read = [name for node in proto.graph.node for name in node.input]
    assert all(read.count(node.output[0]) == 1 for node in made)
