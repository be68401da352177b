"""The operators of the quantize-dequantize form, `fxmpq::*` in `torch.ops`.

Each carries an index: a quantizer's place among the active ones of a planned graph, or a layer's
among its layers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxmpq.formats import NumberFormat, Scheme
from fxmpq.granularity import Dynamic
from fxmpq.quantizers.dynamic import fake_quantize_dynamic
from fxmpq.quantizers.integer import fake_quantize_activation


@torch.library.custom_op("fxmpq::fake_quantize", mutates_args=())
def fake_quantize(x: Tensor, scale: float, zero_point: int, bits: int, index: int) -> Tensor:
    """Round to an affine grid of `2^bits` codes and return to real numbers."""
    return fake_quantize_activation(x, scale, zero_point, NumberFormat(bits, Scheme.AFFINE))


@fake_quantize.register_fake
def _(x: Tensor, scale: float, zero_point: int, bits: int, index: int) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("fxmpq::fake_quantize_rows", mutates_args=())
def fake_quantize_rows(x: Tensor, bits: int, index: int) -> Tensor:
    """Round each row of the last dimension to a grid of `2^bits` codes over its own range."""
    found = NumberFormat(bits, Scheme.AFFINE, dynamic=Dynamic.ROW)
    return fake_quantize_dynamic(x, found) if x.numel() else x.clone()


@fake_quantize_rows.register_fake
def _(x: Tensor, bits: int, index: int) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("fxmpq::widened_codes", mutates_args=())
def widened_codes(codes: Tensor, bits: int, index: int) -> Tensor:
    """Codes stored in `bits` bits, for a runtime that widens them to `int8` as it loads them."""
    return codes.clone()


@widened_codes.register_fake
def _(codes: Tensor, bits: int, index: int) -> Tensor:
    return torch.empty_like(codes)


@torch.library.custom_op("fxmpq::stored_numbers", mutates_args=())
def stored_numbers(codes: Tensor, bits: int, index: int) -> Tensor:
    """Codes stored in `bits` bits, for a runtime that reads them so, as `float32`."""
    return codes.float()


@stored_numbers.register_fake
def _(codes: Tensor, bits: int, index: int) -> Tensor:
    return torch.empty_like(codes, dtype=torch.float32)
