"""Translating the integer operators to ONNX."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import onnx.defs
import onnxscript
from onnx.defs import OpSchema
from onnxscript import opset21 as op
from onnxscript.onnx_types import FLOAT, INT8, INT64, UINT8

from fxmpq.targets.onnxruntime import operators


def _contrib_matmul() -> onnxscript.values.Op:
    """ONNX Runtime's `MatMulIntegerToFloat`, with the schema that the exporter asks for."""
    operands = [
        ("A", "tensor(uint8)"),
        ("B", "tensor(int8)"),
        ("a_scale", "tensor(float)"),
        ("b_scale", "tensor(float)"),
        ("a_zero_point", "tensor(uint8)"),
        ("b_zero_point", "tensor(int8)"),
        ("bias", "tensor(float)"),
    ]
    schema = OpSchema(
        "MatMulIntegerToFloat",
        "com.microsoft",
        1,
        inputs=[OpSchema.FormalParameter(name, kind) for name, kind in operands],
        outputs=[OpSchema.FormalParameter("Y", "tensor(float)")],
    )
    opset = onnxscript.values.Opset("com.microsoft", 1)
    return onnxscript.values.Op(opset, "MatMulIntegerToFloat", schema)


_MATMUL = _contrib_matmul()


def _quantize(x: FLOAT, scale: float, zero_point: int) -> UINT8:
    return op.QuantizeLinear(x, _float(scale), _uint8(zero_point))


def _dequantize(codes: UINT8, scale: float, zero_point: int) -> FLOAT:
    return op.DequantizeLinear(codes, _float(scale), _uint8(zero_point))


def _dequantize_channels(codes: INT8, scale: FLOAT) -> FLOAT:
    return op.DequantizeLinear(codes, scale, axis=0)


def _integer_linear(
    x: UINT8, scale: float, zero_point: int, codes: INT8, weight_scale: FLOAT, bias: FLOAT
) -> FLOAT:
    # Weights are symmetric; the operator still wants their zero point to reach the bias.
    zero = op.Constant(value=onnx.helper.make_tensor("zero", onnx.TensorProto.INT8, [], [0]))
    return _MATMUL(x, codes, _float(scale), weight_scale, _uint8(zero_point), zero, bias)


def _integer_embedding(indices: INT64, codes: INT8, scale: FLOAT) -> FLOAT:
    rows = op.Cast(op.Gather(codes, indices, axis=0), to=onnx.TensorProto.FLOAT)
    last = op.Constant(value_ints=[-1])
    return op.Mul(rows, op.Unsqueeze(op.Gather(scale, indices, axis=0), last))


def _float(value: float) -> FLOAT:
    return op.Constant(value_float=value)


def _uint8(value: int) -> UINT8:
    return op.Constant(value=onnx.helper.make_tensor("zero", onnx.TensorProto.UINT8, [], [value]))


def _overload(operator: object) -> Callable[..., object]:
    overload = operator._opoverload  # type: ignore[attr-defined]
    assert callable(overload)
    return overload


TRANSLATIONS: Mapping[Callable[..., object], Callable[..., object]] = {
    _overload(operators.quantize): _quantize,
    _overload(operators.dequantize): _dequantize,
    _overload(operators.dequantize_channels): _dequantize_channels,
    _overload(operators.integer_linear): _integer_linear,
    _overload(operators.integer_embedding): _integer_embedding,
}
