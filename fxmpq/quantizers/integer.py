"""Integer codes: the arithmetic that simulation and conversion share, so that they agree."""

from __future__ import annotations

import torch
from torch import Tensor

from fxmpq.formats import NumberFormat


def per_channel(values: Tensor, rank: int, axis: int) -> Tensor:
    """Reshape a vector of channel values so that it broadcasts against a tensor.

    Args:
        values: One value per channel, shape `[channels]`.
        rank: Number of dimensions of the tensor it will meet.
        axis: The tensor's channel dimension.

    Returns:
        `values` with shape `[1, ..., channels, ..., 1]`.
    """
    shape = [1] * rank
    shape[axis] = -1
    return values.reshape(shape)


def weight_codes(weight: Tensor, scale: Tensor, number_format: NumberFormat, axis: int) -> Tensor:
    """Quantize a weight to symmetric integer codes, one scale per channel.

    `q = clamp(round(w / scale), qmin, qmax)`, rounding half to even.

    Args:
        weight: Any shape.
        scale: Positive, shape `[weight.shape[axis]]`.
        number_format: A symmetric format.
        axis: The channel dimension of `weight`.

    Returns:
        Codes, `int8` up to 8 bits and `int16` above, with the shape of `weight`.

    Examples:
        >>> weight_codes(torch.tensor([[0.1, -0.2]]), torch.tensor([0.1]), NumberFormat(2), 0)
        tensor([[ 1, -2]], dtype=torch.int8)
    """
    codes = torch.round(weight / per_channel(scale, weight.dim(), axis))
    codes = codes.clamp_(number_format.qmin, number_format.qmax)
    return codes.to(torch.int8 if number_format.bits <= 8 else torch.int16)


def dequantize_weight(codes: Tensor, scale: Tensor, axis: int) -> Tensor:
    """Turn weight codes back to real numbers: `w = scale * q`.

    Args:
        codes: Integer codes of any shape.
        scale: One scale per channel, shape `[codes.shape[axis]]`.
        axis: The channel dimension.

    Returns:
        A tensor in the dtype of `scale`.
    """
    return codes.to(scale.dtype) * per_channel(scale, codes.dim(), axis)


def fake_quantize_activation(
    x: Tensor, scale: float, zero_point: int, number_format: NumberFormat
) -> Tensor:
    """Round an activation to an affine grid and return it in real numbers.

    `x_q = scale * (clamp(round(x / scale) + zero_point, qmin, qmax) - zero_point)`; the
    gradient is 1 inside the range and 0 outside (straight-through).

    Args:
        x: Any shape.
        scale: Positive step.
        zero_point: The code of 0.0, inside `[qmin, qmax]`.
        number_format: An affine format.

    Returns:
        A tensor like `x`.

    Examples:
        >>> from fxmpq.formats import Scheme
        >>> uint2 = NumberFormat(2, Scheme.AFFINE)
        >>> fake_quantize_activation(torch.tensor([-1.0, 0.4, 0.6, 9.0]), 0.5, 1, uint2)
        tensor([-0.5000,  0.5000,  0.5000,  1.0000])
    """
    return torch.fake_quantize_per_tensor_affine(
        x, scale, zero_point, number_format.qmin, number_format.qmax
    )
