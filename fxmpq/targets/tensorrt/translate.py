"""Translating codes and numbers to ONNX."""

from __future__ import annotations

from typing import Any

import torch
from onnxscript import opset21
from onnxscript.onnx_types import FLOAT, INT8

from fxmpq.targets.onnx_export import Translations
from fxmpq.targets.tensorrt import operators  # noqa: F401  (registers torch.ops.fxmpq)

# The exporter calls these with values of its own; opset21's annotations describe eager tensors.
op: Any = opset21


def _codes(x: FLOAT, scale: FLOAT, zero: INT8) -> INT8:
    result: INT8 = op.QuantizeLinear(x, scale, zero)
    return result


def _numbers(codes: INT8, scale: FLOAT, axis: int, block: int) -> FLOAT:
    result: FLOAT = op.DequantizeLinear(codes, scale, axis=axis, block_size=block)
    return result


TRANSLATIONS: Translations = {
    torch.ops.fxmpq.symmetric_codes.default: _codes,
    torch.ops.fxmpq.symmetric_numbers.default: _numbers,
}
