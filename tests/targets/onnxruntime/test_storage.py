from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, fx, nn

from fxmpq.formats import NumberFormat
from fxmpq.graph.trace import trace
from fxmpq.steps import cost
from fxmpq.targets.convert import convert
from fxmpq.targets.onnxruntime.storage import narrow_codes

Made = Callable[..., fx.GraphModule]


def drawn(bits: int, shape: tuple[int, ...]) -> NDArray[np.int8]:
    number_format = NumberFormat(bits)
    generator = np.random.default_rng(bits)
    return generator.integers(number_format.qmin, number_format.qmax + 1, shape).astype(np.int8)


def model_of(**codes: NDArray[np.int8]) -> onnx.ModelProto:
    """Adds up the sums of its code tensors, each cast to float."""
    initializers = [numpy_helper.from_array(value, name) for name, value in codes.items()]
    nodes = []
    for name in codes:
        nodes.append(helper.make_node("Cast", [name], [f"{name}_float"], to=TensorProto.FLOAT))
        nodes.append(helper.make_node("ReduceSum", [f"{name}_float"], [f"{name}_sum"], keepdims=0))
    nodes.append(helper.make_node("Sum", ["x", *(f"{name}_sum" for name in codes)], ["y"]))
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, []) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "graph", value[:1], value[1:], initializers)
    opsets = [helper.make_opsetid("", 21)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def narrowed(model: onnx.ModelProto) -> onnx.ModelProto:
    found = ir.from_proto(model)
    narrow_codes(found)
    proto = ir.to_proto(found)
    onnx.checker.check_model(proto, full_check=True)
    return proto


def run(model: onnx.ModelProto) -> float:
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return float(session.run(None, {"x": np.array(1.0, np.float32)})[0])


@pytest.mark.parametrize(
    ("bits", "kind", "opset", "version"),
    [(2, TensorProto.INT2, 25, 13), (4, TensorProto.INT4, 21, 10), (8, TensorProto.INT8, 21, 10)],
)
def test_codes_are_stored_in_their_width(bits: int, kind: int, opset: int, version: int) -> None:
    codes = drawn(bits, (13, 7))
    model = narrowed(model_of(**{f"codes_{bits}bit_weight": codes}))
    (stored,) = model.graph.initializer
    assert stored.data_type == kind
    assert len(stored.raw_data) == -(-codes.size * bits // 8)
    assert np.array_equal(numpy_helper.to_array(stored).astype(np.int8), codes)
    assert model.opset_import[0].version == opset
    assert model.ir_version == version
    assert run(model) == 1 + codes.astype(int).sum()


def test_several_widths_and_readers_share_a_file() -> None:
    codes = {f"codes_{bits}bit_weight": drawn(bits, (5, 6)) for bits in (2, 4, 8)}
    other = {"scale_of_something": drawn(4, (3,))}
    model = narrowed(model_of(**codes, **other))
    kinds = {entry.name: entry.data_type for entry in model.graph.initializer}
    assert kinds == {
        "codes_2bit_weight": TensorProto.INT2,
        "codes_4bit_weight": TensorProto.INT4,
        "codes_8bit_weight": TensorProto.INT8,
        "scale_of_something": TensorProto.INT8,
    }
    assert model.opset_import[0].version == 25
    total = sum(int(value.astype(int).sum()) for value in (codes | other).values())
    assert run(model) == 1 + total


@pytest.mark.parametrize(("bits", "factor"), [(2, 32), (2, 2), (4, 8)])
def test_multiples_of_a_factor_are_stored_divided(bits: int, factor: int) -> None:
    codes = drawn(bits, (13, 7))
    name = f"codes_{bits}bit{factor}_weight"
    model = narrowed(model_of(**{name: codes * np.int8(factor)}))
    stored = {entry.name: entry for entry in model.graph.initializer}[name]
    assert np.array_equal(numpy_helper.to_array(stored).astype(np.int8), codes)
    assert run(model) == 1 + factor * codes.astype(int).sum()


def test_codes_share_the_constant_of_a_factor() -> None:
    codes = {f"codes_4bit8_{name}": drawn(4, (3, 5)) * np.int8(8) for name in "abc"}
    model = narrowed(model_of(**codes, codes_2bit32_d=drawn(2, (3, 5)) * np.int8(32)))
    assert len(model.graph.initializer) == 4 + 2
    assert "Constant" not in {node.op_type for node in model.graph.node}


def test_the_runtime_widens_the_codes_when_it_loads_the_file(tmp_path: Path) -> None:
    fine = drawn(2, (5, 6)) * np.int8(32)
    model = narrowed(model_of(codes_4bit_weight=drawn(4, (5, 6)), codes_2bit32_weight=fine))
    operators = [node.op_type for node in model.graph.node]
    assert operators[0] == "Cast"
    assert operators.count("Cast") == 2 + 3
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "executed.onnx")
    onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    executed = onnx.load(options.optimized_model_filepath)
    assert not {"Cast", "Mul"} & {node.op_type for node in executed.graph.node}


def test_a_newer_file_stays_newer() -> None:
    model = ir.from_proto(model_of(codes_8bit_weight=drawn(8, (2,))))
    model.graph.opset_imports[""] = 24
    model.ir_version = 12
    narrow_codes(model)
    assert (model.graph.opset_imports[""], model.ir_version) == (24, 12)


class MidSize(nn.Module):
    """Five million weights, nearly all of them in three layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.wide = nn.Conv2d(3, 64, 3), nn.Conv2d(64, 512, 3)
        self.deep, self.fc = nn.Conv2d(512, 768, 3), nn.Linear(768, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = self.wide(self.stem(x).relu()).relu()
        return self.fc(self.deep(x).relu().mean((2, 3)))


def test_files_are_as_large_as_the_cost_model_says(
    calibrated: Made, uniform: Made, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 3, 9, 9)
    ready = calibrated(trace(MidSize(), x), [x], "onnxruntime")
    costs = cost(ready)
    for index, precision in ((0, "w2a8"), (2, "w8a8")):
        made = convert(uniform(ready, index), output=tmp_path / precision)
        predicted = costs.total("weights", costs.uniform(precision))
        assert predicted > 10**6
        assert 1 < made.files[0].stat().st_size / predicted < 1.03
        model = onnx.load(made.files[0])
        floats = [
            entry for entry in model.graph.initializer if entry.data_type == TensorProto.FLOAT
        ]
        # Scales and biases: one number a channel, and no weight besides its codes.
        assert all(math.prod(entry.dims) <= 1000 for entry in floats)
        stored = sum(len(entry.raw_data) for entry in model.graph.initializer)
        assert made.files[0].stat().st_size - stored < 8000
