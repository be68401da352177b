"""Scales of a weight: how many there are, how they meet the weight, how they are stored."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from fxmpq.formats import NumberFormat, ScaleKind, Scheme
from fxmpq.granularity import Granularity, PerBlock, PerTensor
from fxmpq.quantizers.floating import (
    exponent_of,
    float_codes,
    float_layout,
    float_values,
    power_of_two,
    round_to_float,
)

_E8M0_BIAS = 127
_SMALLEST = float(torch.finfo(torch.float32).tiny)
_LARGEST_POWER = 2.0**127
_LARGEST_E4M3 = 0x7E  # the code of 448


def scale_shape(
    shape: tuple[int, ...], axis: int, granularity: Granularity
) -> tuple[int] | tuple[int, int]:
    """Shape of a weight's scales: `[1]`, `[channels]` or `[channels, blocks]`.

    Args:
        shape: Of the weight.
        axis: Its channel dimension.
        granularity: How many values share a scale.

    Examples:
        >>> from fxmpq.granularity import PerChannel
        >>> weight = (8, 4, 3, 3)
        >>> [scale_shape(weight, 0, found) for found in (PerTensor(), PerChannel(), PerBlock(16))]
        [(1,), (8,), (8, 3)]
    """
    if isinstance(granularity, PerTensor):
        return (1,)
    channels = shape[axis]
    if not isinstance(granularity, PerBlock):
        return (channels,)
    values = 1
    for size in shape:
        values *= size
    return channels, -(-(values // max(channels, 1)) // granularity.size)


def scale_rows(weight: Tensor, axis: int, granularity: Granularity) -> Tensor:
    """Arrange a weight so that each row holds the values of one scale.

    Args:
        weight: Any shape of at least one dimension.
        axis: The channel dimension.
        granularity: How many values share a scale.

    Returns:
        Shape `[scales, values]`, scales in C order of `scale_shape`; a block that is shorter
        than the others is filled up with zeros.

    Examples:
        >>> scale_rows(torch.arange(1, 7).reshape(2, 3), 0, PerBlock(2)).tolist()
        [[1, 2], [3, 0], [4, 5], [6, 0]]
    """
    if isinstance(granularity, PerTensor):
        return weight.reshape(1, -1)
    rows = weight.transpose(0, axis).reshape(weight.shape[axis], -1)
    if not isinstance(granularity, PerBlock):
        return rows
    missing = -rows.shape[1] % granularity.size
    padded = functional.pad(rows, (0, missing)) if missing else rows
    return padded.reshape(-1, granularity.size)


def spread_scale(
    scale: Tensor, shape: tuple[int, ...], axis: int, granularity: Granularity
) -> Tensor:
    """Bring a weight's scales into a shape that broadcasts against the weight.

    Args:
        scale: In `scale_shape`.
        shape: Of the weight.
        axis: Its channel dimension.
        granularity: How many values share a scale.

    Returns:
        One value per tensor or per channel, with ones elsewhere; per block the whole of `shape`.

    Examples:
        >>> spread_scale(torch.tensor([[1.0, 2.0]]), (1, 3), 0, PerBlock(2))
        tensor([[1., 1., 2.]])
    """
    if isinstance(granularity, PerBlock):
        moved = list(shape)
        moved[0], moved[axis] = moved[axis], moved[0]
        values = 1
        for size in moved[1:]:
            values *= size
        rows = scale.repeat_interleave(granularity.size, dim=1)[:, :values]
        return rows.reshape(moved).transpose(0, axis)
    ones = [1] * len(shape)
    if not isinstance(granularity, PerTensor):
        ones[axis] = -1
    return scale.reshape(ones)


def storable_scale(scale: Tensor, number_format: NumberFormat) -> Tensor:
    """Round scales to what the format stores.

    `float32` scales stay. E8M0 scales become the power of two that is nearest in ratio,
    `2^round(log2 s)`. E4M3 scales become `t * v` with the smallest power of two `t` for which the
    largest of them is at most `448 t`, and `v` the nearest positive E4M3 number: products of a
    4-bit significand and a power of two are exact. Rounding twice changes nothing.

    Args:
        scale: Positive, shape `[channels, blocks]` or any other.
        number_format: Whose `scale_kind` counts.

    Returns:
        `float32` like `scale`.

    Examples:
        >>> from fxmpq.formats import Precision
        >>> storable_scale(torch.tensor([0.3, 0.7]), Precision.parse("we2m1b32").weight)
        tensor([0.2500, 0.5000])
    """
    kind = number_format.scale_kind
    if kind is ScaleKind.E8M0:
        bounded = scale.float().clamp(_SMALLEST, _LARGEST_POWER)
        below = power_of_two(exponent_of(bounded))
        return torch.where(bounded / below > 2**0.5, 2 * below, below)
    if kind is ScaleKind.E4M3 and scale.numel():
        return round_to_e4m3_scale(scale, e4m3_tensor_scale(scale))
    return scale


def storable_scale_above(scale: Tensor, number_format: NumberFormat) -> Tensor:
    """The smallest scales that the format stores and that are not below the given ones.

    Args:
        scale: Positive, any shape.
        number_format: Whose `scale_kind` counts.

    Returns:
        `float32` like `scale`; the largest that can be stored where there is none above.

    Examples:
        >>> from fxmpq.formats import Precision
        >>> storable_scale_above(torch.tensor([0.25, 0.3]), Precision.parse("we2m1b32").weight)
        tensor([0.2500, 0.5000])
    """
    kind = number_format.scale_kind
    nearest = storable_scale(scale, number_format)
    if kind is ScaleKind.FLOAT32 or not scale.numel():
        return nearest
    if kind is ScaleKind.E8M0:
        next_larger = (2 * nearest).clamp(max=_LARGEST_POWER)
    else:
        tensor_scale = e4m3_tensor_scale(scale)
        codes = float_codes(nearest / tensor_scale, Scheme.E4M3)
        # Codes of positive floats ascend, and the tensor's scale reaches its largest.
        next_larger = float_values((codes + 1).clamp(max=_LARGEST_E4M3), Scheme.E4M3) * tensor_scale
    return torch.where(nearest < scale, next_larger, nearest)


def round_to_e4m3_scale(scale: Tensor, tensor_scale: Tensor) -> Tensor:
    """The nearest product of a positive E4M3 number and a scale of the whole tensor.

    Args:
        scale: Positive.
        tensor_scale: A power of two, shape `[]`.

    Returns:
        `float32` like `scale`, from `2^-9` to 448 times `tensor_scale`.

    Examples:
        >>> round_to_e4m3_scale(torch.tensor([0.3, 1e9]), torch.tensor(0.5))
        tensor([  0.3125, 224.0000])
    """
    layout = float_layout(Scheme.E4M3)
    smallest = layout.smallest_normal * 2.0**-layout.mantissa_bits
    relative = round_to_float(scale / tensor_scale, Scheme.E4M3).clamp(min=smallest)
    return relative * tensor_scale


def e4m3_tensor_scale(scale: Tensor) -> Tensor:
    """The smallest power of two `t` with `max(scale) <= 448 t`, shape `[]`."""
    # E4M3 reaches down to 2^-9, and the product has to stay normal.
    largest = (scale.max() / float_layout(Scheme.E4M3).largest).clamp(min=2.0**-117)
    below = power_of_two(exponent_of(largest))
    return torch.where(largest > below, 2 * below, below)


def pack_scale(scale: Tensor, number_format: NumberFormat) -> dict[str, Tensor]:
    """Turn scales into what is stored.

    Args:
        scale: From `storable_scale`.
        number_format: Whose `scale_kind` counts.

    Returns:
        `scale` (`float32`; or `uint8`, the exponent plus 127 for E8M0, the bit pattern for E4M3),
        and for E4M3 `tensor_scale`, `float32` of shape `[1]`.

    Examples:
        >>> from fxmpq.formats import Precision
        >>> pack_scale(torch.tensor([0.25, 0.5]), Precision.parse("we2m1b32").weight)
        {'scale': tensor([125, 126], dtype=torch.uint8)}
    """
    kind = number_format.scale_kind
    if kind is ScaleKind.E8M0:
        return {"scale": (exponent_of(scale) + _E8M0_BIAS).to(torch.uint8)}
    if kind is ScaleKind.E4M3:
        tensor_scale = e4m3_tensor_scale(scale)
        codes = float_codes(scale / tensor_scale, Scheme.E4M3)
        return {"scale": codes, "tensor_scale": tensor_scale.reshape(1)}
    return {"scale": scale}


def unpack_scale(packed: dict[str, Tensor], number_format: NumberFormat) -> Tensor:
    """Undo `pack_scale`.

    Examples:
        >>> from fxmpq.formats import Precision
        >>> packed = {"scale": torch.tensor([125, 126], dtype=torch.uint8)}
        >>> unpack_scale(packed, Precision.parse("we2m1b32").weight)
        tensor([0.2500, 0.5000])
    """
    kind, stored = number_format.scale_kind, packed["scale"]
    if kind is ScaleKind.E8M0:
        return power_of_two(stored.to(torch.int32) - _E8M0_BIAS)
    if kind is ScaleKind.E4M3:
        return float_values(stored, Scheme.E4M3) * packed["tensor_scale"]
    return stored
