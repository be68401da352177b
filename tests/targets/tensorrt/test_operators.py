from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from fxmpq.targets.tensorrt import operators  # noqa: F401  (registers torch.ops.fxmpq)

own = torch.ops.fxmpq


@given(
    st.lists(st.floats(-200, 200, width=32), min_size=1, max_size=20),
    st.sampled_from([0.25, 0.5, 1.0, 2.0]),
)
def test_int8_codes_are_those_of_onnx(values: list[float], scale: float) -> None:
    x, step, zero = torch.tensor(values), torch.tensor(scale), torch.tensor(0, dtype=torch.int8)
    node = helper.make_node("QuantizeLinear", ["x", "s", "z"], ["y"])
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "xs"]
        + [helper.make_tensor_value_info("z", TensorProto.INT8, [])],
        [helper.make_tensor_value_info("y", TensorProto.INT8, None)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])
    feed = {"x": x.numpy(), "s": step.numpy(), "z": zero.numpy()}
    (expected,) = ReferenceEvaluator(model).run(None, feed)
    assert own.symmetric_codes(x, step, zero).tolist() == expected.tolist()


def test_e4m3_codes_are_torchs_and_do_not_overflow() -> None:
    x = torch.linspace(-500, 500, 4001)
    zero = torch.zeros((), dtype=torch.float8_e4m3fn)
    codes = own.symmetric_codes(x, torch.tensor(0.5), zero)
    assert codes.dtype is torch.float8_e4m3fn
    expected = (x / 0.5).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(codes.float(), expected.float())


@pytest.mark.parametrize(
    ("scale", "axis", "block", "factors"),
    [
        ([[]], 0, 0, [[3.0] * 4] * 2),
        ([1.0, 2.0], 0, 0, [[1.0] * 4, [2.0] * 4]),
        ([1.0, 2.0, 3.0, 4.0], 1, 0, [[1.0, 2.0, 3.0, 4.0]] * 2),
        ([[1.0, 2.0], [3.0, 4.0]], 1, 2, [[1.0, 1.0, 2.0, 2.0], [3.0, 3.0, 4.0, 4.0]]),
        ([[1.0, 2.0, 3.0, 4.0]], 0, 2, [[1.0, 2.0, 3.0, 4.0]] * 2),
    ],
)
def test_numbers_are_codes_times_their_scale(
    scale: list, axis: int, block: int, factors: list
) -> None:
    codes = torch.tensor([[1, -2, 3, -4], [5, 6, -7, 8]], dtype=torch.int8)
    scales = torch.tensor(3.0) if scale == [[]] else torch.tensor(scale)
    found = own.symmetric_numbers(codes, scales, axis, block)
    assert torch.equal(found, codes * torch.tensor(factors))


def test_shapes_and_types_are_known_without_values() -> None:
    with torch.device("meta"):
        x, scale = torch.ones(2, 3), torch.ones(())
        codes = own.symmetric_codes(x, scale, torch.ones((), dtype=torch.int8))
        real = own.symmetric_numbers(codes, scale, 0, 0)
    assert (codes.shape, codes.dtype) == ((2, 3), torch.int8)
    assert (real.shape, real.dtype) == ((2, 3), torch.float32)
