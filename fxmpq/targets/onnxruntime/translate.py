"""Translating the integer operators to ONNX."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import onnx.defs
import onnxscript
import torch
from onnx.defs import OpSchema
from onnxscript import opset21
from onnxscript.onnx_types import FLOAT, INT8, INT64, UINT8

from fxmpq.targets.onnxruntime import operators  # noqa: F401  (registers torch.ops.fxmpq)


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


# The exporter calls these with values of its own; opset21's annotations describe eager tensors.
op: Any = opset21
_MATMUL: Any = _contrib_matmul()


def _quantize(x: FLOAT, scale: float, zero_point: int) -> UINT8:
    result: UINT8 = op.QuantizeLinear(x, _float(scale), _uint8(zero_point))
    return result


def _dequantize(codes: UINT8, scale: float, zero_point: int) -> FLOAT:
    result: FLOAT = op.DequantizeLinear(codes, _float(scale), _uint8(zero_point))
    return result


def _dequantize_channels(codes: INT8, scale: FLOAT) -> FLOAT:
    result: FLOAT = op.DequantizeLinear(codes, scale, axis=0)
    return result


def _integer_linear(
    x: UINT8, scale: float, zero_point: int, codes: INT8, weight_scale: FLOAT, bias: FLOAT
) -> FLOAT:
    # Weights are symmetric; the operator still wants their zero point to reach the bias.
    zero = op.Constant(value=onnx.helper.make_tensor("zero", onnx.TensorProto.INT8, [], [0]))
    result: FLOAT = _MATMUL(x, codes, _float(scale), weight_scale, _uint8(zero_point), zero, bias)
    return result


def _integer_embedding(indices: INT64, codes: INT8, scale: FLOAT) -> FLOAT:
    rows = op.Cast(op.Gather(codes, indices, axis=0), to=onnx.TensorProto.FLOAT)
    last = op.Constant(value_ints=[-1])
    result: FLOAT = op.Mul(rows, op.Unsqueeze(op.Gather(scale, indices, axis=0), last))
    return result


def _float(value: float) -> FLOAT:
    result: FLOAT = op.Constant(value_float=value)
    return result


def _uint8(value: int) -> UINT8:
    result: UINT8 = op.Constant(
        value=onnx.helper.make_tensor("zero", onnx.TensorProto.UINT8, [], [value])
    )
    return result


TRANSLATIONS: Mapping[Callable[..., object], Callable[..., object]] = {
    torch.ops.fxmpq.quantize.default: _quantize,
    torch.ops.fxmpq.dequantize.default: _dequantize,
    torch.ops.fxmpq.dequantize_channels.default: _dequantize_channels,
    torch.ops.fxmpq.integer_linear.default: _integer_linear,
    torch.ops.fxmpq.integer_embedding.default: _integer_embedding,
}
