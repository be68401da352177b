from __future__ import annotations

import tempfile
from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto, helper

from fxmpq.targets.onnxruntime.session import OnnxModel


def doubled_twice() -> onnx.ModelProto:
    """Adds a number to itself twice, and ignores its second input."""
    nodes = [
        helper.make_node("Identity", ["x"], ["same"]),
        helper.make_node("Add", ["same", "x"], ["two"]),
        helper.make_node("Add", ["two", "two"], ["four"]),
    ]
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["samples"]),
        helper.make_tensor_value_info("ignored", TensorProto.INT64, [1]),
    ]
    outputs = [helper.make_tensor_value_info("four", TensorProto.FLOAT, ["samples"])]
    graph = helper.make_graph(nodes, "graph", inputs, outputs)
    opsets = [helper.make_opsetid("", 21)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def test_tensors_are_fed_in_order_and_the_rest_left_out() -> None:
    model = OnnxModel(doubled_twice().SerializeToString(), threads=1)
    (found,) = model([torch.tensor([1.5, -2.0]), "an option", torch.zeros(1, dtype=torch.int64)])
    assert found.tolist() == [6.0, -8.0]
    assert model.session.get_session_options().intra_op_num_threads == 1


def test_the_executed_graph_is_the_optimized_one() -> None:
    model = OnnxModel(doubled_twice().SerializeToString())
    assert [node.op_type for node in model.executed.graph.node] == ["Add", "Add"]


def test_no_file_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    OnnxModel(doubled_twice().SerializeToString())
    with pytest.raises(Exception, match="Failed to load model"):
        OnnxModel(b"no model")
    assert list(tmp_path.iterdir()) == []


def test_without_optimization_each_node_runs_as_written() -> None:
    model = OnnxModel(doubled_twice().SerializeToString(), optimized=False)
    assert [node.op_type for node in model.executed.graph.node] == ["Identity", "Add", "Add"]
    (found,) = model([torch.tensor([1.5]), torch.zeros(1, dtype=torch.int64)])
    assert found.tolist() == [6.0]
