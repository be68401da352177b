"""Translating the integer operators to ONNX."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
        ("B", "T"),
        ("a_scale", "tensor(float)"),
        ("b_scale", "tensor(float)"),
        ("a_zero_point", "tensor(uint8)"),
        ("b_zero_point", "T"),
        ("bias", "tensor(float)"),
    ]
    optional = OpSchema.FormalParameterOption.Optional
    schema = OpSchema(
        "MatMulIntegerToFloat",
        "com.microsoft",
        1,
        inputs=[
            OpSchema.FormalParameter(name, kind, param_option=optional) for name, kind in operands
        ],
        outputs=[OpSchema.FormalParameter("Y", "tensor(float)")],
        type_constraints=[("T", ["tensor(int8)", "tensor(uint8)"], "")],
    )
    opset = onnxscript.values.Opset("com.microsoft", 1)
    return onnxscript.values.Op(opset, "MatMulIntegerToFloat", schema)


def _contrib_blocks(name: str, operands: Sequence[str], integers: Sequence[str]) -> Any:  # noqa: ANN401
    """One of ONNX Runtime's operators on packed blocks, with a schema that takes what it takes."""
    kinds = ["tensor(float)", "tensor(uint8)", "tensor(int64)", "tensor(int32)"]
    optional = OpSchema.FormalParameterOption.Optional
    schema = OpSchema(
        name,
        "com.microsoft",
        1,
        inputs=[OpSchema.FormalParameter(entry, "T", param_option=optional) for entry in operands],
        outputs=[OpSchema.FormalParameter("Y", "tensor(float)")],
        type_constraints=[("T", kinds, "")],
        attributes=[
            OpSchema.Attribute(entry, OpSchema.AttrType.INT, "", required=False)
            for entry in integers
        ],
    )
    return onnxscript.values.Op(onnxscript.values.Opset("com.microsoft", 1), name, schema)


# The exporter calls these with values of its own; opset21's annotations describe eager tensors.
op: Any = opset21
_MATMUL: Any = _contrib_matmul()
_BLOCK_MATMUL: Any = _contrib_blocks(
    "MatMulNBits",
    ["A", "B", "scales", "zero_points", "g_idx", "bias"],
    ["K", "N", "bits", "block_size", "accuracy_level"],
)
_BLOCK_GATHER: Any = _contrib_blocks(
    "GatherBlockQuantized",
    ["data", "indices", "scales"],
    ["gather_axis", "quantize_axis", "block_size", "bits"],
)
_FLOAT_ACCURACY = 1
"""Kernels that multiply in `float32`; higher levels round the input to 8 bits on the way."""


def _quantize(x: FLOAT, scale: float, zero_point: int) -> UINT8:
    result: UINT8 = op.QuantizeLinear(x, _float(scale), _uint8(zero_point))
    return result


def _dequantize(codes: UINT8, scale: float, zero_point: int) -> FLOAT:
    result: FLOAT = op.DequantizeLinear(codes, _float(scale), _uint8(zero_point))
    return result


def _dynamic_quantize(x: FLOAT) -> tuple[UINT8, FLOAT, UINT8]:
    codes, scale, zero_point = op.DynamicQuantizeLinear(x)
    return codes, scale, zero_point


def _dynamic_dequantize(codes: UINT8, scale: FLOAT, zero_point: UINT8) -> FLOAT:
    result: FLOAT = op.DequantizeLinear(codes, scale, zero_point)
    return result


def _dequantize_channels(codes: INT8, scale: FLOAT, axis: int = 0) -> FLOAT:
    result: FLOAT = op.DequantizeLinear(codes, scale, axis=axis)
    return result


def _integer_linear(
    x: UINT8, scale: float, zero_point: int, codes: INT8, weight_scale: FLOAT, bias: FLOAT
) -> FLOAT:
    return _dynamic_linear(x, _float(scale), _uint8(zero_point), codes, weight_scale, bias)


def _dynamic_linear(
    x: UINT8, scale: FLOAT, zero_point: UINT8, codes: INT8, weight_scale: FLOAT, bias: FLOAT
) -> FLOAT:
    # Weights are symmetric; the operator still wants their zero point to reach the bias.
    zero = op.Constant(value=onnx.helper.make_tensor("zero", onnx.TensorProto.INT8, [], [0]))
    result: FLOAT = _MATMUL(x, codes, scale, weight_scale, zero_point, zero, bias)
    return result


def _integer_product(
    x: UINT8, x_scale: float, x_zero: int, y: UINT8, y_scale: float, y_zero: int
) -> FLOAT:
    scales = (_float(x_scale), _float(y_scale))
    result: FLOAT = _MATMUL(x, y, *scales, _uint8(x_zero), _uint8(y_zero))
    return result


def _integer_embedding(indices: INT64, codes: INT8, scale: FLOAT) -> FLOAT:
    rows = op.Cast(op.Gather(codes, indices, axis=0), to=onnx.TensorProto.FLOAT)
    last = op.Constant(value_ints=[-1])
    result: FLOAT = op.Mul(rows, op.Unsqueeze(op.Gather(scale, indices, axis=0), last))
    return result


def _block_linear(
    x: FLOAT,
    packed: UINT8,
    scale: FLOAT,
    bias: FLOAT | None,
    bits: int,
    block: int,
    width: int,
    rows: int,
) -> FLOAT:
    result: FLOAT = _BLOCK_MATMUL(
        x,
        packed,
        scale,
        None,
        None,
        bias,
        K=width,
        N=rows,
        bits=bits,
        block_size=block,
        accuracy_level=_FLOAT_ACCURACY,
    )
    return result


def _block_embedding(
    indices: INT64, packed: UINT8, scale: FLOAT, bits: int, block: int, width: int
) -> FLOAT:
    rows: FLOAT = _BLOCK_GATHER(
        packed, indices, scale, gather_axis=0, quantize_axis=1, block_size=block, bits=bits
    )
    if width % block == 0:
        return rows
    # The stored rows are filled up to whole blocks.
    ends = [op.Constant(value_ints=[value]) for value in (0, width, -1)]
    result: FLOAT = op.Slice(rows, *ends)
    return result


def _grouped_linear(x: FLOAT, weight: FLOAT, ends: INT64, is_turned: bool) -> FLOAT:
    """One product for each expert, of the rows that are its own, be there any or none."""
    experts = _rows(ends)
    channels = _rows(weight) // experts
    stops = op.Cast(ends, to=onnx.TensorProto.INT64)
    start = _integers(0)
    found = []
    for expert in range(experts):
        stop = op.Slice(stops, _integers(expert), _integers(expert + 1))
        own = (_integers(expert * channels), _integers((expert + 1) * channels), _integers(0))
        matrix = op.Transpose(op.Slice(weight, *own), perm=[1, 0])
        found.append(op.MatMul(op.Slice(x, start, stop, _integers(0)), matrix))
        start = stop
    # Rows behind the last expert's are zero.
    rest = op.Sub(op.Shape(x, start=0, end=1), start)
    found.append(op.ConstantOfShape(op.Concat(rest, _integers(channels), axis=0)))
    result: FLOAT = op.Concat(*found, axis=0)
    return result


def _rows(value: Any) -> int:  # noqa: ANN401  (the exporter's values know their shapes)
    return int(value.shape[0])


def _integers(*values: int) -> INT64:
    result: INT64 = op.Constant(value_ints=list(values))
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
    torch.ops.fxmpq.dynamic_quantize.default: _dynamic_quantize,
    torch.ops.fxmpq.dynamic_dequantize.default: _dynamic_dequantize,
    torch.ops.fxmpq.integer_linear.default: _integer_linear,
    torch.ops.fxmpq.dynamic_linear.default: _dynamic_linear,
    torch.ops.fxmpq.integer_product.default: _integer_product,
    torch.ops.fxmpq.integer_embedding.default: _integer_embedding,
    torch.ops.fxmpq.block_linear.default: _block_linear,
    torch.ops.fxmpq.block_embedding.default: _block_embedding,
    torch.ops.fxmpq.grouped_linear.default: _grouped_linear,
}
