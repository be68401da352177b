from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from fxmpq.targets.tensorrt.model import LintedModel, integer, is_standard, operand


def linted(*nodes: onnx.NodeProto, **stored: np.ndarray) -> LintedModel:
    initializers = [numpy_helper.from_array(value, name) for name, value in stored.items()]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])
    return LintedModel(helper.make_model(helper.make_graph(nodes, "g", [x], [], initializers)))


@pytest.mark.parametrize(
    ("attribute", "expected"),
    [
        ({"value_float": 0.5}, np.float32(0.5)),
        ({"value_int": 3}, np.int64(3)),
        ({"value_floats": [1.0, 2.0]}, np.array([1, 2], np.float32)),
        ({"value_ints": [4]}, np.array([4])),
        ({"value": numpy_helper.from_array(np.int8([7]))}, np.array([7], np.int8)),
    ],
)
def test_constants_of_every_kind_are_read(
    attribute: dict[str, object], expected: np.ndarray
) -> None:
    model = linted(helper.make_node("Constant", [], ["c"], **attribute))
    found = model.array("c")
    assert found is not None
    assert found.dtype == expected.dtype
    assert np.array_equal(found, expected)
    assert model.type_of("c") == helper.np_dtype_to_tensor_dtype(expected.dtype)


def test_the_type_of_codes_is_that_of_the_zero_point() -> None:
    model = linted(
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["y"]),
        helper.make_node("QuantizeLinear", ["x", "s"], ["u"]),
        s=np.float32(1),
        z=np.int8(0),
    )
    assert model.type_of("y") == TensorProto.INT8
    assert model.type_of("u") == TensorProto.UNDEFINED


def test_text_is_a_constant_without_numbers() -> None:
    model = linted(helper.make_node("Constant", [], ["c"], value_string="text"))
    assert model.is_constant("c")
    assert model.array("c") is None


def test_what_is_computed_of_constants_is_constant() -> None:
    model = linted(
        helper.make_node("Neg", ["w"], ["negative"]),
        helper.make_node("Add", ["x", "negative"], ["sum"]),
        helper.make_node("RandomNormal", [], ["noise"], shape=[1]),
        w=np.float32([1.0]),
    )
    assert model.is_constant("negative")
    assert not any(map(model.is_constant, ("x", "sum", "noise", "nothing")))
    assert model.readers["negative"] == [1]
    assert model.type_of("nothing") == TensorProto.UNDEFINED


def test_what_graphs_inside_a_node_compute_is_no_constant() -> None:
    """Their operands are not those of the node."""
    inner = helper.make_node("Neg", ["x"], ["negative"])
    branch = helper.make_graph([inner], "branch", [], [helper.ValueInfoProto(name="negative")])
    choose = helper.make_node("If", ["yes"], ["y"], then_branch=branch, else_branch=branch)
    model = linted(choose, yes=np.bool_(True))
    assert [node.op_type for node in model.nodes] == ["If", "Neg", "Neg"]
    assert not model.is_constant("y")


def calling(*body: onnx.NodeProto) -> LintedModel:
    """A model that calls a function of its own."""
    call = helper.make_node("Double", ["x"], ["y"], domain="own")
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])
    graph = helper.make_graph([call], "g", [x], [])
    versions = [helper.make_opsetid("", 21), helper.make_opsetid("own", 1)]
    function = helper.make_function("own", "Double", ["a"], ["b"], [*body], versions)
    return LintedModel(helper.make_model(graph, functions=[function], opset_imports=versions))


def test_functions_are_looked_into() -> None:
    model = calling(helper.make_node("Add", ["a", "a"], ["b"]))
    assert [(node.op_type, *node.input, *node.output) for node in model.nodes] == [
        ("Add", "x", "x", "y")
    ]
    assert len(model.proto.functions) == 1


def test_functions_that_call_themselves_stay_calls() -> None:
    model = calling(helper.make_node("Double", ["a"], ["b"], domain="own"))
    assert [node.op_type for node in model.nodes] == ["Double"]


def test_nodes_have_names_for_people() -> None:
    named, unnamed = (
        helper.make_node("Neg", ["x"], ["y"], name="first"),
        helper.make_node("Neg", ["x"], ["z"]),
    )
    bare = helper.make_node("Neg", ["x"], [])
    assert linted(named, unnamed, bare).names == ["first", "z", "Neg 2"]


def test_operands_and_attributes_may_be_left_out() -> None:
    node = helper.make_node("DequantizeLinear", ["w", "s"], ["y"], axis=3)
    assert [operand(node, place) for place in range(3)] == ["w", "s", ""]
    assert (integer(node, "axis", 1), integer(node, "block_size", 0)) == (3, 0)


def test_the_standard_domain_has_two_names() -> None:
    half = helper.make_node("Constant", [], ["c"], value_float=0.5, domain="ai.onnx")
    assert linted(half).is_constant("c")
    assert linted(half).array("c") == np.float32(0.5)
    assert is_standard(half)


def test_operators_of_other_domains_are_others() -> None:
    model = linted(
        helper.make_node("QuantizeLinear", ["x", "s"], ["y"]),
        helper.make_node("QuantizeLinear", ["x", "s"], ["z"], domain="com.microsoft"),
    )
    assert [name for name, _ in model.pairs("QuantizeLinear")] == ["y"]
