from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from fxmpq.errors import TargetError
from fxmpq.targets.tensorrt import lint
from fxmpq.targets.tensorrt.rules import LINT_RULES, Violation

FLOAT, INT8, INT4, UINT8, INT32 = (
    getattr(TensorProto, name) for name in ("FLOAT", "INT8", "INT4", "UINT8", "INT32")
)
Change = Callable[[onnx.ModelProto], None]


def stored(name: str, kind: int, shape: list[int], value: float = 1) -> onnx.TensorProto:
    return helper.make_tensor(name, kind, shape, [value] * int(np.prod(shape)))


def node(operator: str, inputs: str, output: str, **attributes: object) -> onnx.NodeProto:
    return helper.make_node(operator, inputs.split(), [output], name=f"{output}_node", **attributes)


def legal() -> onnx.ModelProto:
    """A linear layer of int8, and one of 4-bit weights, as the rules allow."""
    nodes = [
        node("QuantizeLinear", "x x_scale zero", "codes"),
        node("DequantizeLinear", "codes x_scale zero", "real"),
        node("DequantizeLinear", "w w_scale", "weight", axis=1),
        node("MatMul", "real weight", "product"),
        node("Add", "product bias", "hidden"),
        node("DequantizeLinear", "v v_scale", "narrow", axis=0, block_size=64),
        node("MatMul", "hidden narrow", "y"),
    ]
    initializers = [
        stored("x_scale", FLOAT, [], 0.1),
        stored("zero", INT8, [], 0),
        stored("w", INT8, [32, 128]),
        stored("w_scale", FLOAT, [128], 0.1),
        stored("bias", FLOAT, [128]),
        stored("v", INT4, [128, 6], 3),
        stored("v_scale", FLOAT, [2, 6], 0.1),
    ]
    values = [helper.make_tensor_value_info(*entry) for entry in (("x", FLOAT, ["n", 32]),)]
    results = [helper.make_tensor_value_info("y", FLOAT, ["n", 6])]
    graph = helper.make_graph(nodes, "graph", values, results, initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def put(model: onnx.ModelProto, tensor: onnx.TensorProto) -> None:
    """Store a tensor instead of the one of its name."""
    kept = [entry for entry in model.graph.initializer if entry.name != tensor.name]
    del model.graph.initializer[:]
    model.graph.initializer.extend([*kept, tensor])


def place(model: onnx.ModelProto, output: str) -> onnx.NodeProto:
    return next(entry for entry in model.graph.node if output in entry.output)


def storing(*tensors: onnx.TensorProto) -> Change:
    def change(model: onnx.ModelProto) -> None:
        for tensor in tensors:
            put(model, tensor)

    return change


def reading(output: str, position: int, name: str, *tensors: onnx.TensorProto) -> Change:
    """A node reads something else."""

    def change(model: onnx.ModelProto) -> None:
        place(model, output).input[position] = name
        storing(*tensors)(model)

    return change


def inserting(*nodes: onnx.NodeProto) -> Change:
    def change(model: onnx.ModelProto) -> None:
        for entry in reversed(nodes):
            model.graph.node.insert(0, entry)

    return change


def both(*changes: Change) -> Change:
    def change(model: onnx.ModelProto) -> None:
        for entry in changes:
            entry(model)

    return change


def without_zero_point(model: onnx.ModelProto) -> None:
    for output in ("codes", "real"):
        del place(model, output).input[2]


BREACHES: list[tuple[str, str, Change, str]] = [
    ("valid model", "", reading("y", 0, "nothing"), "onnx.checker refuses the model"),
    (
        "standard operators",
        "other_node",
        inserting(node("Gelu", "x", "other", domain="com.microsoft")),
        "Gelu is of the domain 'com.microsoft'",
    ),
    (
        "supported operators",
        "other_node",
        inserting(node("MatMulInteger", "w w", "other")),
        "MatMulInteger is not supported",
    ),
    ("quantized types", "codes_node", storing(stored("zero", UINT8, [], 0)), "on UINT8; there are"),
    ("quantized types", "codes_node", without_zero_point, "QuantizeLinear on UINT8; there are"),
    ("quantized types", "weight_node", storing(stored("w", UINT8, [32, 128])), "on UINT8"),
    (
        "quantized types",
        "weight_node",
        storing(stored("w", TensorProto.FLOAT8E5M2, [32, 128])),
        "on FLOAT8E5M2",
    ),
    (
        "float bias",
        "other_node",
        both(
            storing(stored("b", INT32, [128])),
            inserting(node("DequantizeLinear", "b x_scale", "other")),
            reading("hidden", 1, "other"),
        ),
        "DequantizeLinear on INT32, as of a quantized bias",
    ),
    ("no zero points", "real_node", storing(stored("zero", INT8, [], -128)), "zero point -128"),
    (
        "no zero points",
        "codes_node",
        both(
            inserting(
                node("ReduceMin", "x", "least", keepdims=0),
                node("Cast", "least", "zero_then", to=INT8),
            ),
            reading("codes", 2, "zero_then"),
        ),
        "a zero point that is computed at run time",
    ),
    (
        "constant scales",
        "codes_node",
        both(
            inserting(node("ReduceMax", "x", "largest", keepdims=0)),
            reading("codes", 1, "largest"),
            reading("real", 1, "largest"),
        ),
        "the scale 'largest', which is computed at run time",
    ),
    ("constant scales", "codes_node", storing(stored("x_scale", FLOAT, [], -1)), "not positive"),
    (
        "constant scales",
        "codes_node",
        storing(stored("x_scale", FLOAT, [], float("inf"))),
        "or not finite",
    ),
    (
        "one scale an activation",
        "codes_node",
        storing(stored("x_scale", FLOAT, [32]), stored("zero", INT8, [32], 0)),
        "quantized with 32 scales, not with one",
    ),
    (
        "shapes of scales",
        "weight_node",
        storing(stored("w_scale", FLOAT, [64])),
        "64 scales along axis 1 of [32, 128]",
    ),
    (
        "shapes of scales",
        "codes_node",
        storing(stored("zero", INT8, [32], 0)),
        "32 zero points for 1 scales",
    ),
    (
        "shapes of scales",
        "narrow_node",
        storing(stored("v_scale", FLOAT, [2, 3])),
        "scales of [2, 3] for [128, 6]; one of the last two axes",
    ),
    (
        "4 bits in blocks of weights",
        "narrow_node",
        storing(stored("v_scale", FLOAT, [4, 6])),
        "INT4 weights of [128, 6] with scales of [4, 6]; they have one for each block of 64 or 128",
    ),
    (
        "4 bits in blocks of weights",
        "codes_node",
        storing(stored("zero", INT4, [], 0)),
        "an activation is INT4, which only weights may be",
    ),
    (
        "dequantized codes",
        "product_node",
        reading("product", 1, "w"),
        "MatMul reads the codes 'w' undequantized",
    ),
]


def test_a_model_by_the_rules_breaks_none(tmp_path: Path) -> None:
    assert lint(legal()) == ()
    onnx.save(legal(), tmp_path / "model.onnx")
    assert lint(tmp_path / "model.onnx") == lint(str(tmp_path / "model.onnx")) == ()


@pytest.mark.parametrize(
    ("rule", "where", "change", "words"), BREACHES, ids=[f"{b[0]}: {b[3]}" for b in BREACHES]
)
def test_each_breach_is_found_and_named(rule: str, where: str, change: Change, words: str) -> None:
    model = legal()
    change(model)
    found = [entry for entry in lint(model) if (entry.rule, entry.node) == (rule, where)]
    assert [entry for entry in found if words in entry.message], lint(model)


def test_every_rule_has_a_model_that_breaks_it() -> None:
    assert {rule for rule, *_ in BREACHES} == {rule.name for rule in LINT_RULES}
    assert all(rule.source for rule in LINT_RULES)


def test_constants_may_be_nodes_and_scales_computed_of_constants() -> None:
    model = legal()
    inserting(
        helper.make_node("Constant", [], ["half"], value_float=0.5),
        node("Mul", "half half", "quarter"),
    )(model)
    reading("codes", 1, "quarter")(model)
    reading("real", 1, "quarter")(model)
    assert lint(model) == ()
    zero = stored("", INT8, [], 3)
    inserting(helper.make_node("Constant", [], ["three"], value=zero))(model)
    reading("codes", 2, "three")(model)
    assert [entry.rule for entry in lint(model)] == ["no zero points"]


def test_branches_are_looked_into() -> None:
    model = legal()
    inner = [node("DequantizeLinear", "w w_scale odd", "inner", axis=1)]
    tensors = [stored("odd", INT8, [128], 7)]
    value = [helper.make_tensor_value_info("inner", FLOAT, [32, 128])]
    branch = helper.make_graph(inner, "branch", [], value, tensors)
    inserting(
        helper.make_node(
            "Constant", [], ["yes"], value=helper.make_tensor("", TensorProto.BOOL, [], [1])
        ),
        node("If", "yes", "chosen", then_branch=branch, else_branch=branch),
    )(model)
    assert {entry.node for entry in lint(model) if entry.rule == "no zero points"} == {"inner_node"}


def test_broken_nodes_are_listed_too() -> None:
    model = legal()
    del place(model, "codes").output[:]
    assert [entry.rule for entry in lint(model)] == ["valid model"]


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="cannot read the ONNX model"):
        lint(tmp_path / "nothing.onnx")
    (tmp_path / "text.onnx").write_text("no model")
    with pytest.raises(TargetError, match=r"text\.onnx' is no ONNX model"):
        lint(tmp_path / "text.onnx")
    (tmp_path / "plan.json").write_text('{"groups": []}')
    with pytest.raises(TargetError, match=r"plan\.json' is no ONNX model"):
        lint(tmp_path / "plan.json")


def test_weights_in_another_file_are_not_read(tmp_path: Path) -> None:
    """Their values cannot break a rule then, and their types can."""
    model = legal()
    put(model, stored("w", UINT8, [32, 128]))
    onnx.save(model, tmp_path / "model.onnx", save_as_external_data=True, size_threshold=0)
    assert Violation("quantized types", "weight_node", lint(model)[0].message) in lint(
        tmp_path / "model.onnx"
    )
