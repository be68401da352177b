from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnx import helper, numpy_helper
from torch import Tensor, fx, nn

from fxmpq.errors import TargetError
from fxmpq.graph.trace import trace
from fxmpq.targets.convert import convert
from fxmpq.targets.lowering import lower
from fxmpq.targets.onnx_export import check_size, export_onnx, write_onnx


@torch.library.custom_op("fxmpq_tests::tripled", mutates_args=())
def tripled(x: Tensor) -> Tensor:
    return 3 * x


@tripled.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Tripled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.rsub(torch.ops.fxmpq_tests.tripled(x), 1)


@pytest.fixture(scope="module")
def graph() -> fx.GraphModule:
    return trace(Tripled(), torch.randn(4, 3))


def test_operators_of_ones_own_are_translated_and_sizes_stay_free(graph: fx.GraphModule) -> None:
    from onnxscript import opset21

    def write(x: Tensor) -> Tensor:
        found: Tensor = opset21.Mul(x, opset21.Constant(value_float=3.0))
        return found

    table = {torch.ops.fxmpq_tests.tripled.default: write}
    model = export_onnx(lower(graph), table, 21)
    operators = [node.op_type for node in model.graph if node.op_type != "Constant"]
    # `rsub` was written in operators that the exporter takes.
    assert operators == ["Mul", "Neg", "Add"]
    assert model.opset_imports[""] == 21
    assert not any(node.metadata_props for node in model.graph)
    (x,) = model.graph.inputs
    assert isinstance(x.shape, ir.Shape)
    assert isinstance(x.shape[0], ir.SymbolicDim)
    assert x.shape[1] == 3


def test_an_operator_without_translation_is_named(graph: fx.GraphModule) -> None:
    with pytest.raises(TargetError, match=r"cannot write this model: .*tripled.*'reference' takes"):
        export_onnx(lower(graph), {}, 21)


def test_what_one_file_cannot_hold_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = [numpy_helper.from_array(np.zeros(size, np.int8), f"w{size}") for size in (600, 401)]
    proto = helper.make_model(helper.make_graph([], "g", [], [], weights))
    check_size(proto)
    monkeypatch.setattr("fxmpq.targets.onnx_export._LARGEST", 1001)
    check_size(proto)
    monkeypatch.setattr("fxmpq.targets.onnx_export._LARGEST", 1000)
    with pytest.raises(TargetError, match="an ONNX file holds .*'openvino' or 'reference'"):
        check_size(proto)


@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt"])
def test_conversion_refuses_what_one_file_cannot_hold(
    target: str,
    calibrated: Callable[..., fx.GraphModule],
    uniform: Callable[..., fx.GraphModule],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    planned = uniform(calibrated(trace(nn.Linear(8, 4), x), [x], target))
    monkeypatch.setattr("fxmpq.targets.onnx_export._LARGEST", 16)
    with pytest.raises(TargetError, match="an ONNX file holds"):
        convert(planned)


def test_a_file_is_written_whole_into_a_new_folder(tmp_path: Path) -> None:
    for content in (b"one", b"another"):
        file = write_onnx(content, tmp_path / "new" / "folder")
        assert file == tmp_path / "new" / "folder" / "model.onnx"
        assert file.read_bytes() == content
        assert list(file.parent.iterdir()) == [file]
