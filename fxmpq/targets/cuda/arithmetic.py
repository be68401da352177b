"""What a converted graph computes with: plain functions of tensors, made of torch's operators.

A graph calls them as nodes, and `torch.compile` looks through them. Codes are `int8` numbers, or
`uint8` bit patterns of E4M3 numbers: every device moves, compares and looks up bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from fxmpq.granularity import PerBlock
from fxmpq.quantizers.scales import spread_scale

LARGEST_E4M3 = 448.0


def to_int8(x: Tensor, inverse_scale: float, zero_point: int) -> Tensor:
    """Quantize an activation to signed codes, `clamp(round(x / s) + z, -128, 127)`.

    Args:
        x: Any shape.
        inverse_scale: `1 / s`, rounded to `float32`.
        zero_point: The code of 0.0, in `[-128, 127]`.

    Returns:
        `int8` like `x`.

    Examples:
        >>> to_int8(torch.tensor([-1.0, 0.0, 0.4, 9.0]), 10.0, -100)
        tensor([-110, -100,  -96,  -10], dtype=torch.int8)
    """
    return (x.float() * inverse_scale).round_().add_(zero_point).clamp_(-128, 127).to(torch.int8)


def to_e4m3(x: Tensor, scale: float) -> Tensor:
    """Quantize an activation to E4M3, saturating: the bit patterns of `x / s`.

    Args:
        x: Any shape.
        scale: `s`.

    Returns:
        `uint8` like `x`.

    Examples:
        >>> to_e4m3(torch.tensor([0.5, 900.0]), 0.5).view(torch.float8_e4m3fn).tolist()
        [1.0, 448.0]
    """
    relative = (x.float() / scale).clamp_(-LARGEST_E4M3, LARGEST_E4M3)
    return relative.to(torch.float8_e4m3fn).view(torch.uint8)


def patches(
    x: Tensor,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    fill: int,
) -> Tensor:
    """Lay out what a convolution reads for each output position in a row.

    Args:
        x: `[..., channels, *space]`.
        kernel: Sizes, one a dimension of space.
        stride: Steps between positions.
        padding: What is added to `x`, as `pad` takes it: before and behind, the last dimension
            first.
        dilation: Steps between the values of a patch.
        fill: What is added.

    Returns:
        `[..., *positions, product of kernel * channels]`, channels innermost: where `x` lies in
        memory with its channels last, as what this library's convolutions return, whole runs are
        copied.

    Examples:
        >>> x = torch.arange(4.0).reshape(1, 1, 4)
        >>> patches(x, (2,), (1,), (0, 0), (1,), 0).tolist()
        [[[0.0, 1.0], [1.0, 2.0], [2.0, 3.0]]]
    """
    if any(padding):
        x = functional.pad(x, padding, value=fill)
    rank = len(kernel)
    first = x.dim() - rank - 1
    rows = x.movedim(first, -1)
    if max(kernel) > 1:
        rows = rows.contiguous()
    for axis, (size, step, gap) in enumerate(zip(kernel, stride, dilation, strict=True)):
        rows = rows.unfold(first + axis, gap * (size - 1) + 1, step)[..., ::gap]
    return rows.movedim(first + rank, -1).flatten(first + rank)


def channels_first(y: Tensor, rank: int) -> Tensor:
    """Bring `[..., *space, channels]` into a convolution's order `[..., channels, *space]`.

    Args:
        y: With its channels last.
        rank: Dimensions of space.
    """
    return y.movedim(-1, -1 - rank)


def padded_rows(x: Tensor, inner: int, least: int) -> Tensor:
    """Flatten to a matrix of at least so many rows of a given length, with zeros behind.

    Args:
        x: `[..., values]`.
        inner: Length of a row, at least as many as values.
        least: The fewest rows.

    Returns:
        `[max(rows, least), inner]`, contiguous; `x` itself in another shape where it is that.

    Examples:
        >>> padded_rows(torch.ones(1, 2), 3, 2).tolist()
        [[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]
    """
    rows = x.reshape(-1, x.shape[-1])
    missing = max(least - rows.shape[0], 0)
    if missing == 0 and rows.shape[1] == inner:
        return rows.contiguous()
    return functional.pad(rows, (0, inner - rows.shape[1], 0, missing))


def int8_product(
    codes: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, least_rows: int, dtype: torch.dtype
) -> Tensor:
    """A linear layer on integers: `y = scale * (codes W^T) + bias`, sums exact in 32 bits.

    Args:
        codes: `int8`, `[..., inner]`.
        weight: `int8`, `[out', in']`, filled up with zeros.
        scale: `[out]`: that of the activation times those of the weight.
        bias: `[out]`, in which the activation's zero point is settled.
        least_rows: The fewest rows that the kernel takes.
        dtype: Of the result.

    Returns:
        `[..., out]`.

    Examples:
        >>> codes, weight = torch.tensor([[1, 2]]).char(), torch.tensor([[3, 4]]).char()
        >>> scale, bias = torch.tensor([0.5]), torch.tensor([1.0])
        >>> int8_product(codes, weight, scale, bias, 1, torch.float32)
        tensor([[6.5000]])
    """
    rows = padded_rows(codes, weight.shape[1], least_rows)
    sums = torch._int_mm(rows, weight.t())
    return _in_real_numbers(sums, scale, bias, codes, dtype)


def e4m3_product(
    codes: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    one: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """A linear layer on E4M3 numbers: `y = scale * (codes W^T) + bias`, sums in `float32`.

    The kernel gets scales of 1 and returns `float32`: with a scale for each channel of its own it
    would add in the same precision, and return less on some devices.

    Args:
        codes: Bit patterns, `uint8`, `[..., inner]`.
        weight: Bit patterns, `uint8`, `[out', in']`, filled up with zeros.
        scale: `[out]`: that of the activation times those of the weight.
        bias: `[out]`.
        one: The number 1, `float32`, shape `[]`.
        dtype: Of the result.

    Returns:
        `[..., out]`.

    Examples:
        >>> codes = to_e4m3(torch.tensor([[1.0, 2.0]]), 1.0)
        >>> weight = to_e4m3(torch.tensor([[3.0, 4.0]]), 1.0)
        >>> scale, bias, one = torch.tensor([0.5]), torch.tensor([1.0]), torch.tensor(1.0)
        >>> e4m3_product(codes, weight, scale, bias, one, torch.float32)
        tensor([[6.5000]])
    """
    rows = padded_rows(codes, weight.shape[1], 1).view(torch.float8_e4m3fn)
    columns = weight.view(torch.float8_e4m3fn).t()
    sums = torch._scaled_mm(rows, columns, one, one, out_dtype=torch.float32)
    return _in_real_numbers(sums, scale, bias, codes, dtype)


def int4_product(
    x: Tensor,
    packed: Tensor,
    scales_and_zeros: Tensor,
    bias: Tensor | None,
    size: tuple[int, int],
    block: int,
    dtype: torch.dtype,
) -> Tensor:
    """A linear layer on bfloat16 activations and packed 4-bit weights, results in bfloat16.

    Args:
        x: Float, `[..., in]`.
        packed: As the device's kernel wants it, of sizes that are filled up.
        scales_and_zeros: `bfloat16`, `[in' / block, out', 2]`.
        bias: `[out]`, added in its own precision, or `None`.
        size: The inner size, filled up, and the number of output channels.
        block: Weights that share a scale.
        dtype: Of the result.

    Returns:
        `[..., out]`.
    """
    inner, outer = size
    rows = padded_rows(x.to(torch.bfloat16), inner, 1)
    is_cpu = x.device.type == "cpu"
    multiply = torch._weight_int4pack_mm_for_cpu if is_cpu else torch._weight_int4pack_mm
    found = multiply(rows, packed, block, scales_and_zeros)
    wanted = found.narrow(0, 0, x.shape[:-1].numel()).narrow(1, 0, outer)
    y = wanted.reshape(*x.shape[:-1], outer).to(dtype)
    return y if bias is None else y + bias


def dequantized(codes: Tensor, scale: Tensor, block: int | None) -> Tensor:
    """A weight in real numbers, of codes that stay stored.

    Args:
        codes: `int8`, or `uint8` for E4M3, `[channels, ...]`.
        scale: `[1]`, `[channels]`, or `[channels, blocks]`.
        block: Values that share a scale, if they do in blocks.

    Returns:
        In the dtype of the scale.

    Examples:
        >>> dequantized(torch.tensor([[1, 2, 3]]).char(), torch.tensor([[1.0, 2.0]]), 2)
        tensor([[1., 2., 6.]])
    """
    if block is not None:
        scale = spread_scale(scale, tuple(codes.shape), 0, PerBlock(block))
    else:
        scale = scale.reshape(-1, *[1] * (codes.dim() - 1))
    return _numbers(codes, scale.dtype) * scale


def looked_up(codes: Tensor, scale: Tensor, indices: Tensor, block: int | None) -> Tensor:
    """Rows of an embedding, of which only those that are asked for become real numbers.

    Args:
        codes: `int8`, or `uint8` for E4M3, `[rows, width]`.
        scale: `[1]`, `[rows]`, or `[rows, blocks]`.
        indices: Any shape.
        block: Values that share a scale, if they do in blocks.

    Returns:
        `[*indices, width]`, in the dtype of the scale.

    Examples:
        >>> table, scale = torch.tensor([[1, 2], [3, 4]]).char(), torch.tensor([1.0, 0.5])
        >>> looked_up(table, scale, torch.tensor([1]), None)
        tensor([[1.5000, 2.0000]])
    """
    found = _numbers(codes[indices], scale.dtype)
    if scale.numel() == 1:
        return found * scale.reshape(())
    chosen = scale[indices]
    if block is None:
        return found * chosen.unsqueeze(-1)
    return found * chosen.repeat_interleave(block, dim=-1)[..., : codes.shape[1]]


def _numbers(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """What codes stand for."""
    return (codes.view(torch.float8_e4m3fn) if codes.dtype is torch.uint8 else codes).to(dtype)


def _in_real_numbers(
    sums: Tensor, scale: Tensor, bias: Tensor, codes: Tensor, dtype: torch.dtype
) -> Tensor:
    """Cut off what was filled up, and scale sums of codes."""
    leading, outer = codes.shape[:-1], scale.shape[0]
    wanted = sums.narrow(0, 0, leading.numel()).narrow(1, 0, outer).to(scale.dtype)
    return torch.addcmul(bias, wanted, scale).reshape(*leading, outer).to(dtype)
