"""Integer arithmetic that simulation and conversion share, so that they agree."""

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
