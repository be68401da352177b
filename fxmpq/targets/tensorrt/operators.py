"""What quantizes and dequantizes, as ONNX has it and PyTorch has not."""

from __future__ import annotations

import torch
from torch import Tensor

from fxmpq.formats import NumberFormat, Scheme
from fxmpq.quantizers.floating import round_to_float

_INT8 = NumberFormat(8)


@torch.library.custom_op("fxmpq::symmetric_codes", mutates_args=())
def symmetric_codes(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Codes of a tensor on a grid around zero, in the type of a zero: `int8` or `float8_e4m3fn`.

    `clamp(round(x / scale), -128, 127)`, or the nearest E4M3 number.
    """
    units = x / scale
    if zero.dtype is torch.int8:
        return units.round().clamp(_INT8.qmin, _INT8.qmax).to(torch.int8)
    return round_to_float(units, Scheme.E4M3).to(zero.dtype)


@symmetric_codes.register_fake
def _(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return torch.empty_like(x, dtype=zero.dtype)


@torch.library.custom_op("fxmpq::symmetric_numbers", mutates_args=())
def symmetric_numbers(codes: Tensor, scale: Tensor, axis: int, block: int) -> Tensor:
    """Real numbers of codes: `code * scale`.

    Scales are of shape `[]` (one for all), `[channels]` along the axis, or that of the codes with
    the axis cut into blocks of `block`, which is 0 otherwise.
    """
    if block:
        scale = scale.repeat_interleave(block, axis)
    elif scale.dim():
        scale = scale.reshape([-1 if axis == place else 1 for place in range(codes.dim())])
    return codes.float() * scale


@symmetric_numbers.register_fake
def _(codes: Tensor, scale: Tensor, axis: int, block: int) -> Tensor:
    return torch.empty_like(codes, dtype=torch.float32)
