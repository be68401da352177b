"""The integer operators of the ONNX form: PyTorch operators that say what they compute.

The graph is rewritten to these before export, so it can be run and checked in PyTorch, and
each of them is translated to ONNX by one function in `translate.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxmpq.formats import NumberFormat, Scheme
from fxmpq.granularity import Dynamic
from fxmpq.quantizers.dynamic import dynamic_grid
from fxmpq.quantizers.integer import per_channel
from fxmpq.targets.onnxruntime.blocks import dequantize_rows

_DYNAMIC = NumberFormat(8, Scheme.AFFINE, dynamic=Dynamic.TENSOR)


@torch.library.custom_op("fxmpq::quantize", mutates_args=())
def quantize(x: Tensor, scale: float, zero_point: int) -> Tensor:
    """`clamp(round(x / scale) + zero_point, 0, 255)` as `uint8`."""
    return (torch.round(x / scale) + zero_point).clamp(0, 255).to(torch.uint8)


@quantize.register_fake
def _(x: Tensor, scale: float, zero_point: int) -> Tensor:
    return torch.empty_like(x, dtype=torch.uint8)


@torch.library.custom_op("fxmpq::dequantize", mutates_args=())
def dequantize(codes: Tensor, scale: float, zero_point: int) -> Tensor:
    """`scale * (codes - zero_point)` in `float32`."""
    return (codes.float() - zero_point) * scale


@dequantize.register_fake
def _(codes: Tensor, scale: float, zero_point: int) -> Tensor:
    return torch.empty_like(codes, dtype=torch.float32)


@torch.library.custom_op("fxmpq::dynamic_quantize", mutates_args=())
def dynamic_quantize(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`uint8` codes of a tensor on the grid of its own values, with its scale and zero point."""
    scale, zero_point = dynamic_grid(x, _DYNAMIC)
    codes = (torch.round(x / scale) + zero_point).clamp(0, 255).to(torch.uint8)
    return codes, scale, zero_point.to(torch.uint8)


@dynamic_quantize.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    scale = x.new_empty(())
    return torch.empty_like(x, dtype=torch.uint8), scale, scale.to(torch.uint8)


@torch.library.custom_op("fxmpq::dynamic_dequantize", mutates_args=())
def dynamic_dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """`scale * (codes - zero_point)` in `float32`, on a grid that was found at run time."""
    return (codes.float() - zero_point) * scale


@dynamic_dequantize.register_fake
def _(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    return torch.empty_like(codes, dtype=torch.float32)


@torch.library.custom_op("fxmpq::dequantize_channels", mutates_args=())
def dequantize_channels(codes: Tensor, scale: Tensor, axis: int = 0) -> Tensor:
    """`scale_c * codes_c` along a dimension, for stored weights and biases."""
    return codes.to(scale.dtype) * per_channel(scale, codes.dim(), axis)


@dequantize_channels.register_fake
def _(codes: Tensor, scale: Tensor, axis: int = 0) -> Tensor:
    return torch.empty_like(codes, dtype=torch.float32)


def _linear(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return (x @ codes.double().T * per_channel(scale, x.dim(), -1) + bias.double()).float()


@torch.library.custom_op("fxmpq::integer_linear", mutates_args=())
def integer_linear(
    x: Tensor, scale: float, zero_point: int, codes: Tensor, weight_scale: Tensor, bias: Tensor
) -> Tensor:
    """A linear layer on `uint8` input and `int8` weights `[out, in]`, with float output."""
    return _linear(x.double() - zero_point, codes, weight_scale.double() * scale, bias)


@integer_linear.register_fake
def _(
    x: Tensor, scale: float, zero_point: int, codes: Tensor, weight_scale: Tensor, bias: Tensor
) -> Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[0]), dtype=torch.float32)


@torch.library.custom_op("fxmpq::dynamic_linear", mutates_args=())
def dynamic_linear(
    x: Tensor, scale: Tensor, zero_point: Tensor, codes: Tensor, weight_scale: Tensor, bias: Tensor
) -> Tensor:
    """`integer_linear` on codes whose grid was found at run time."""
    return _linear(x.double() - zero_point, codes, weight_scale.double() * scale.double(), bias)


@dynamic_linear.register_fake
def _(
    x: Tensor, scale: Tensor, zero_point: Tensor, codes: Tensor, weight_scale: Tensor, bias: Tensor
) -> Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[0]), dtype=torch.float32)


@torch.library.custom_op("fxmpq::integer_product", mutates_args=())
def integer_product(
    x: Tensor, x_scale: float, x_zero: int, y: Tensor, y_scale: float, y_zero: int
) -> Tensor:
    """A product of two tensors of `uint8` codes, as `torch.matmul` broadcasts, in floats."""
    products = torch.matmul(x.double() - x_zero, y.double() - y_zero)
    return (products * (x_scale * y_scale)).float()


@integer_product.register_fake
def _(x: Tensor, x_scale: float, x_zero: int, y: Tensor, y_scale: float, y_zero: int) -> Tensor:
    return torch.matmul(x.float(), y.float())


@torch.library.custom_op("fxmpq::integer_embedding", mutates_args=())
def integer_embedding(indices: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """Look up rows of `int8` codes `[rows, width]` and multiply each by its row's scale."""
    return codes[indices].float() * scale[indices].unsqueeze(-1)


@integer_embedding.register_fake
def _(indices: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    return codes.new_empty((*indices.shape, codes.shape[1]), dtype=torch.float32)


@torch.library.custom_op("fxmpq::block_linear", mutates_args=())
def block_linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    bits: int,
    block: int,
    width: int,
    rows: int,
) -> Tensor:
    """A linear layer on float input and packed weights `[rows, width]`; see `dequantize_rows`."""
    weight = dequantize_rows(packed, scale, bits, block, width)
    return torch.nn.functional.linear(x, weight, bias)


@block_linear.register_fake
def _(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    bits: int,
    block: int,
    width: int,
    rows: int,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], rows))


@torch.library.custom_op("fxmpq::block_embedding", mutates_args=())
def block_embedding(
    indices: Tensor, packed: Tensor, scale: Tensor, bits: int, block: int, width: int
) -> Tensor:
    """Look up rows of packed codes and dequantize them; see `dequantize_rows`."""
    flat = indices.flatten()
    found = dequantize_rows(packed[flat], scale[flat], bits, block, width)
    return found.reshape(*indices.shape, width)


@block_embedding.register_fake
def _(indices: Tensor, packed: Tensor, scale: Tensor, bits: int, block: int, width: int) -> Tensor:
    return scale.new_empty((*indices.shape, width))
