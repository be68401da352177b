from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fxmpq.formats import NumberFormat, Scheme
from fxmpq.granularity import Dynamic
from fxmpq.quantizers.dynamic import fake_quantize_dynamic
from fxmpq.quantizers.integer import fake_quantize_activation
from fxmpq.targets.onnxruntime import operators
from fxmpq.targets.onnxruntime.blocks import dequantize_rows, pack_rows

PER_TENSOR = NumberFormat(8, Scheme.AFFINE, dynamic=Dynamic.TENSOR)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(st.floats(0.001, 2), st.integers(0, 255), st.integers(0, 50))
def test_a_round_trip_is_the_simulated_quantization(
    scale: float, zero_point: int, seed: int
) -> None:
    x, scale = draw(40, seed=seed), float(torch.tensor(scale))
    codes = operators.quantize(x, scale, zero_point)
    assert codes.dtype is torch.uint8
    found = operators.dequantize(codes, scale, zero_point)
    simulated = fake_quantize_activation(x, scale, zero_point, NumberFormat(8, Scheme.AFFINE))
    # A value half way between two codes may round to either in float32.
    close = torch.isclose(found, simulated, rtol=1e-5, atol=1e-5)
    assert int((~close).sum()) <= 1


@pytest.fixture(scope="module")
def runtime() -> onnxruntime.InferenceSession:
    """ONNX Runtime's `DynamicQuantizeLinear` and back, for any number of values."""
    made, kinds = onnx.helper, onnx.TensorProto
    nodes = [
        made.make_node("DynamicQuantizeLinear", ["x"], ["codes", "scale", "zero"]),
        made.make_node("DequantizeLinear", ["codes", "scale", "zero"], ["real"]),
    ]
    found = {"codes": kinds.UINT8, "scale": kinds.FLOAT, "zero": kinds.UINT8, "real": kinds.FLOAT}
    outputs = [made.make_tensor_value_info(name, kind, None) for name, kind in found.items()]
    inputs = [made.make_tensor_value_info("x", kinds.FLOAT, ["n"])]
    graph = made.make_graph(nodes, "dynamic", inputs, outputs)
    model = made.make_model(graph, opset_imports=[made.make_opsetid("", 21)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


@given(
    st.integers(0, 100_000),
    st.integers(1, 300),
    st.floats(-30, 30),
    st.sampled_from([-5.0, 0.0, 0.3, 5.0]),
)
def test_dynamic_ranges_are_those_of_the_runtime_to_the_last_bit(
    runtime: onnxruntime.InferenceSession, seed: int, values: int, exponent: float, shift: float
) -> None:
    x = (draw(values, seed=seed) + shift) * 2.0**exponent
    codes, scale, zero, real = runtime.run(None, {"x": x.numpy()})
    found = operators.dynamic_quantize(x)
    assert [entry.dtype for entry in found] == [torch.uint8, torch.float32, torch.uint8]
    for one, other in zip(found, (codes, scale, zero), strict=True):
        assert np.array_equal(one.numpy(), other)
    simulated = fake_quantize_dynamic(x, PER_TENSOR)
    assert np.array_equal(simulated.numpy(), real)
    assert torch.equal(operators.dynamic_dequantize(*found), simulated)


def test_a_linear_layer_on_a_dynamic_range_is_the_same_layer() -> None:
    codes = (draw(5, 6, seed=1) * 50).clamp(-128, 127).to(torch.int8)
    weight, bias = (codes, draw(5, seed=2).abs()), draw(5, seed=3)
    x, scale, zero_point = operators.dynamic_quantize(draw(2, 3, 6))
    found = operators.dynamic_linear(x, scale, zero_point, *weight, bias)
    same = operators.integer_linear(x, float(scale), int(zero_point), *weight, bias)
    assert torch.equal(found, same)


def test_channels_are_dequantized_along_the_first_dimension() -> None:
    codes = torch.tensor([[1, -2], [3, 4]], dtype=torch.int8)
    found = operators.dequantize_channels(codes, torch.tensor([0.5, 2.0]))
    assert found.tolist() == [[0.5, -1.0], [6.0, 8.0]]


@pytest.mark.parametrize("shape", [(4, 6), (2, 3, 6)])
def test_an_integer_linear_layer_is_the_dequantized_one(shape: tuple[int, ...]) -> None:
    x = (draw(*shape) * 40 + 128).clamp(0, 255).to(torch.uint8)
    codes = (draw(5, 6, seed=1) * 50).clamp(-128, 127).to(torch.int8)
    scales, bias = draw(5, seed=2).abs(), draw(5, seed=3)
    found = operators.integer_linear(x, 0.03, 120, codes, scales, bias)
    weight = codes.float() * scales[:, None]
    expected = torch.nn.functional.linear((x.float() - 120) * 0.03, weight, bias)
    assert found.dtype is torch.float32
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-3)


def test_an_integer_embedding_scales_its_rows() -> None:
    codes = torch.tensor([[1, -2], [3, 4], [0, 127]], dtype=torch.int8)
    indices = torch.tensor([[2, 0], [0, 0]])
    found = operators.integer_embedding(indices, codes, torch.tensor([0.5, 1.0, 2.0]))
    assert found.tolist() == [[[0.0, 254.0], [0.5, -1.0]], [[0.5, -1.0], [0.5, -1.0]]]


PACKED = pack_rows((draw(5, 24, seed=4) * 3).clamp(-8, 7).to(torch.int8), 4, 16)


def test_a_block_linear_layer_is_the_dequantized_one() -> None:
    x, scale, bias = draw(2, 3, 24), draw(5, 2, seed=5).abs(), draw(5, seed=6)
    weight = dequantize_rows(PACKED, scale, 4, 16, 24)
    for found in (None, bias):
        result = operators.block_linear(x, PACKED, scale, found, 4, 16, 24, 5)
        assert torch.equal(result, torch.nn.functional.linear(x, weight, found))


def test_a_block_embedding_looks_up_dequantized_rows() -> None:
    scale, indices = draw(5, 1, seed=5).abs(), torch.tensor([[4, 0, 4]])
    found = operators.block_embedding(indices, PACKED, scale, 4, 16, 24)
    assert torch.equal(found, dequantize_rows(PACKED, scale, 4, 16, 24)[indices])


CALLS = {
    "block_linear": (draw(2, 3, 24), PACKED, torch.ones(5, 2), torch.ones(5), 4, 16, 24, 5),
    "block_embedding": (torch.zeros(2, 3, dtype=torch.long), PACKED, torch.ones(5, 2), 4, 16, 24),
    "quantize": (draw(3, 4), 0.1, 5),
    "dequantize": (torch.ones(3, 4, dtype=torch.uint8), 0.1, 5),
    "dequantize_channels": (torch.ones(3, 4, dtype=torch.int8), torch.ones(3)),
    "integer_linear": (
        torch.ones(2, 3, 4, dtype=torch.uint8),
        0.1,
        5,
        torch.ones(6, 4, dtype=torch.int8),
        torch.ones(6),
        torch.ones(6),
    ),
    "integer_embedding": (
        torch.zeros(2, 3, dtype=torch.long),
        torch.ones(5, 4, dtype=torch.int8),
        torch.ones(5),
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_shapes_and_types_are_known_before_running(name: str) -> None:
    operator = getattr(operators, name)
    torch.library.opcheck(operator, CALLS[name], test_utils=("test_schema", "test_faketensor"))
    real = operator(*CALLS[name])
    with torch.device("meta"):
        fake = operator(
            *(leaf.to("meta") if isinstance(leaf, Tensor) else leaf for leaf in CALLS[name])
        )
    assert (fake.shape, fake.dtype) == (real.shape, real.dtype)


@pytest.mark.parametrize(
    ("left", "right"),
    [((3, 4), (4, 2)), ((2, 3, 4), (2, 4, 5)), ((2, 1, 3, 4), (1, 5, 4, 2))],
)
def test_an_integer_product_is_that_of_the_dequantized_tensors(
    left: tuple[int, ...], right: tuple[int, ...]
) -> None:
    x = (draw(*left) * 40 + 128).clamp(0, 255).to(torch.uint8)
    y = (draw(*right, seed=1) * 40 + 90).clamp(0, 255).to(torch.uint8)
    found = operators.integer_product(x, 0.03, 120, y, 0.5, 90)
    expected = ((x.double() - 120) * 0.03) @ ((y.double() - 90) * 0.5)
    assert found.dtype is torch.float32
    assert torch.allclose(found.double(), expected, rtol=1e-6)
    fake = operators.integer_product(x.to("meta"), 0.03, 120, y.to("meta"), 0.5, 90)
    assert (fake.shape, fake.dtype) == (expected.shape, torch.float32)
