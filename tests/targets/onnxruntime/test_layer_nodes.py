from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, fx, nn

from fxmpq.formats import Precision
from fxmpq.graph.state import require
from fxmpq.graph.trace import trace
from fxmpq.targets.convert import convert
from fxmpq.targets.onnxruntime.layer_nodes import WrittenModel, layer_nodes, visible_value
from fxmpq.targets.onnxruntime.session import OnnxModel

Made = Callable[..., fx.GraphModule]


def model_of(nodes: list[onnx.NodeProto], output: str, **stored: Tensor) -> onnx.ModelProto:
    initializers = [numpy_helper.from_array(value.numpy(), name) for name, value in stored.items()]
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("x", output)
    ]
    return helper.make_model(
        helper.make_graph(nodes, "graph", values[:1], values[1:], initializers)
    )


def node(operator: str, inputs: str, output: str, **attributes: int) -> onnx.NodeProto:
    return helper.make_node(operator, inputs.split(), [output], **attributes)


def test_stored_values_are_followed_to_where_they_meet_data() -> None:
    written = WrittenModel(
        model_of(
            [
                helper.make_node("Constant", [], ["half"], value_float=0.5),
                node("Mul", "w half", "scaled"),
                node("Transpose", "scaled", "turned"),
                node("MatMul", "x turned", "y"),
                node("Neg", "x", "negative"),
                node("MatMul", "negative scaled", "z"),
                node("Add", "y z", "sum"),
            ],
            "sum",
            w=torch.eye(2),
        )
    )
    assert [user.output[0] for user in written.users_of_stored(["missing", "w"])] == ["y", "z"]
    assert written.is_constant("turned")
    assert not written.is_constant("negative")


def test_a_sole_reader_shares_with_nobody() -> None:
    written = WrittenModel(
        model_of([node("Neg", "x", "y"), node("Neg", "y", "z"), node("Add", "y z", "a")], "a")
    )
    assert written.sole_reader("y") is None
    assert [reader.output[0] for reader in written.readers("y")] == ["z", "a"]
    found = written.sole_reader("z")
    assert found is not None
    assert found.op_type == "Add"
    # A model's output is seen by the caller too.
    model = model_of([node("Neg", "x", "y"), node("Neg", "y", "z")], "y")
    assert WrittenModel(model).sole_reader("y") is None
    assert WrittenModel(model).sole_reader("missing") is None


def test_values_are_known_by_what_makes_them() -> None:
    nodes = [node("Neg", "x", "y"), node("Abs", "y", "z"), node("Neg", "z", "a")]
    written = WrittenModel(model_of(nodes, "a"))
    assert written.made_by("Neg") == {"y", "a"}
    assert written.made_by("Add") == set()


def test_transposes_are_found_by_their_values() -> None:
    matrix = torch.arange(6.0).reshape(2, 3)
    written = WrittenModel(
        model_of([node("MatMul", "x a", "y")], "y", a=matrix.T, b=matrix, c=matrix.T + 1)
    )
    assert written.stored_transposes(matrix) == ["a"]
    assert written.stored_transposes(torch.ones(3)) == []


class Mixed(nn.Module):
    """A convolution before a ReLU, one that stays float, and a linear layer called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.kept = nn.Conv1d(2, 4, 3, padding=1), nn.Conv1d(4, 4, 1)
        self.fc = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.fc(self.kept(self.conv(x).relu())) * 2)


@pytest.fixture(scope="module")
def planned(calibrated: Made, uniform: Made) -> fx.GraphModule:
    torch.manual_seed(0)
    x = torch.randn(4, 2, 6)
    graph = calibrated(trace(Mixed(), x), [x], "onnxruntime", exclude=["kept"])
    return uniform(graph, 2)


def written_mixed(planned: fx.GraphModule) -> WrittenModel:
    """A file as the converter writes it, by hand."""
    kept = planned.get_parameter("kept.weight")
    return WrittenModel(
        model_of(
            [
                node("DequantizeLinear", "conv_codes scale_conv_weight", "w"),
                node("Conv", "x w", "conv"),
                node("Relu", "conv", "relu"),
                node("QuantizeLinear", "relu s", "codes"),
                node("DequantizeLinear", "codes s", "real"),
                node("Conv", "real kept.weight", "kept"),
                node("MatMulIntegerToFloat", "kept fc_codes scale_fc_weight", "fc"),
                node("Mul", "fc two", "doubled"),
                node("MatMulIntegerToFloat", "doubled fc_codes scale_fc_weight", "fc_again"),
            ],
            "fc_again",
            **{
                "conv_codes": torch.zeros(1),
                "scale_conv_weight": torch.ones(1),
                "fc_codes": torch.zeros(1),
                "scale_fc_weight": torch.ones(1),
                "s": torch.ones(()),
                "two": torch.tensor(2.0),
                "kept.weight": kept.detach(),
            },
        )
    )


def test_layers_are_found_by_scales_or_weights_and_calls_by_order(planned: fx.GraphModule) -> None:
    found = layer_nodes(written_mixed(planned), planned)
    assert {name: found[name].output[0] for name in found} == {
        "conv": "conv",
        "kept": "kept",
        "fc": "fc",
        "fc#2": "fc_again",
    }


def test_codes_are_seen_behind_what_fuses(planned: fx.GraphModule) -> None:
    written = written_mixed(planned)
    nodes = {found.name: found for found in planned.graph.nodes}
    seen: dict[str, tuple[str, str]] = {}
    for group in require(planned, stage="calibrated").groups:
        for layer in group.layers:
            place = layer_nodes(written, planned)[layer.name]
            seen[layer.name] = visible_value(written, place, planned, nodes[layer.node], layer)
    quantizer, value = seen["conv"]
    assert value == "real"
    assert nodes[quantizer].op == "call_module"
    assert nodes[quantizer].args[0].name == "relu"
    assert seen["kept"] == ("conv1d_1", "kept")
    assert seen["fc"] == ("linear", "fc")
    assert seen["fc#2"] == ("linear_1", "fc_again")


def test_calls_that_cannot_be_told_apart_are_left_out(planned: fx.GraphModule) -> None:
    model = model_of(
        [node("MatMulIntegerToFloat", "x fc_codes scale_fc_weight", "fc")],
        "fc",
        fc_codes=torch.zeros(1),
        scale_fc_weight=torch.ones(1),
    )
    assert layer_nodes(WrittenModel(model), planned) == {}


class Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 24)
        self.head = nn.Linear(24, 9)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.table(ids))


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        (
            [
                node("Gather", "codes x", "rows"),
                node("Gather", "scale_table_weight x", "scales"),
                node("Unsqueeze", "scales last", "wide"),
                node("Mul", "rows wide", "found"),
                node("Neg", "found", "y"),
            ],
            "found",
        ),
        (
            [
                node("GatherBlockQuantized", "codes x scale_table_weight", "rows", block_size=16),
                node("Slice", "rows last last", "found"),
                node("Neg", "found", "y"),
            ],
            "found",
        ),
        ([node("Gather", "table.weight x", "found"), node("Neg", "found", "y")], "found"),
    ],
)
def test_looked_up_rows_are_seen_in_real_numbers(
    calibrated: Made, uniform: Made, nodes: list[onnx.NodeProto], expected: str
) -> None:
    torch.manual_seed(0)
    ids = torch.arange(8).reshape(2, 4)
    planned = uniform(calibrated(trace(Table(), ids), [ids], "onnxruntime"), 0)
    stored = {name: torch.zeros(1) for name in ("codes", "last", "table.weight")}
    stored["scale_table_weight"] = torch.ones(9)
    written = WrittenModel(model_of(nodes, "y", **stored))
    layer = require(planned, stage="calibrated").group("table").layers[0]
    found = layer_nodes(written, planned)["table"]
    call = next(entry for entry in planned.graph.nodes if entry.name == layer.node)
    assert visible_value(written, found, planned, call, layer) == (layer.node, expected)


def test_a_bias_that_is_added_belongs_to_the_layer(calibrated: Made, uniform: Made) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4)
    planned = uniform(calibrated(trace(nn.Linear(4, 2), x), [x], "onnxruntime", exclude=["*"]))
    (group,) = require(planned, stage="calibrated").groups
    weight = planned.get_parameter("weight").detach().T.contiguous()
    nodes = [node("MatMul", "x folded", "product"), node("Add", "product bias", "y")]
    written = WrittenModel(model_of(nodes, "y", folded=weight, bias=torch.ones(2)))
    found = layer_nodes(written, planned)[group.name]
    assert found.op_type == "MatMul"
    assert np.allclose(weight, planned.get_parameter("weight").detach().T)
    call = next(entry for entry in planned.graph.nodes if entry.name == group.layers[0].node)
    seen = visible_value(written, found, planned, call, group.layers[0])
    assert seen == ("linear", "y")


class CalledTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.fc(x) * self.fc(x).relu(), self.fc(x * 2)


@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt"])
def test_equal_calls_share_the_node_that_the_exporter_makes_of_them(
    calibrated: Made, uniform: Made, target: str
) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 6)
    graph = trace(CalledTwice(), x)
    made = convert(uniform(calibrated(graph, [x], target)), verify=[x])
    assert [row.layer for row in made.layers] == ["fc", "fc#2", "fc#3"]
    assert len({row.kernel for row in made.layers}) == 1
    assert not any("not found" in row.reason for row in made.layers)
    # The node that computes two layers has the first one's name.
    assert isinstance(made.module, OnnxModel)
    names = [node.name for node in made.module.executed.graph.node if "MatMul" in node.op_type]
    assert sorted(names) == ["fc", "fc#3"]


class Clones(nn.Module):
    """Layers that start as copies of one, as those of `nn.TransformerEncoder` do."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(48, 48)
        self.b = copy.deepcopy(self.a)
        self.conv = nn.Conv2d(3, 48, 3)
        self.conv_b = copy.deepcopy(self.conv)

    def forward(self, x: Tensor) -> Tensor:
        rows = (self.conv(x).relu() + self.conv_b(x.neg()).relu()).mean((2, 3))
        return self.b(self.a(rows).relu())


@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt"])
def test_copies_are_told_apart_by_their_codes(
    calibrated: Made, uniform: Made, target: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 6, 6)
    candidates = [Precision(8, 8)]
    graph = uniform(calibrated(trace(Clones(), x), [x], target, candidates=candidates))
    made = convert(graph, verify=[x], output=tmp_path)
    assert {row.layer for row in made.layers} == {"a", "b", "conv", "conv_b"}
    assert {row.reason for row in made.layers} == {""}
    assert not any("unknown" in row.kernel for row in made.layers)
    stored = {entry.name for entry in onnx.load(made.files[0]).graph.initializer}
    assert ("scale_a_weight" in stored) != ("scale_b_weight" in stored)
