"""Block-wise codes as ONNX Runtime's weight-only kernels read them."""

from __future__ import annotations

import torch
from torch import Tensor

from fxmpq.formats import NumberFormat
from fxmpq.granularity import PerBlock

BLOCK_SIZES = (16, 32, 64, 128, 256)
"""Values a scale of the runtime's kernels covers."""


def kernel_block(width: int, number_format: NumberFormat) -> int:
    """The block size that a kernel runs a weight with.

    It divides the format's own block, so that a scale of the format serves whole kernel blocks,
    and the weight's rows where that is possible, so that the file holds nothing that is filled
    up.

    Args:
        width: Values in a row of the weight.
        number_format: With a scale per channel, or per block of one of `BLOCK_SIZES`.

    Returns:
        The largest of `BLOCK_SIZES` that does; the smallest where none divides the rows.

    Examples:
        >>> from fxmpq.formats import Precision
        >>> [kernel_block(768, Precision.parse(name).weight) for name in ("w4", "w4b32")]
        [256, 32]
        >>> kernel_block(40, Precision.parse("w4b32").weight)
        16
    """
    granularity = number_format.granularity
    shared = granularity.size if isinstance(granularity, PerBlock) else BLOCK_SIZES[-1]
    dividing = [size for size in BLOCK_SIZES if shared % size == 0 and width % size == 0]
    return max(dividing, default=BLOCK_SIZES[0])


def scale_columns(width: int, block: int, stored: int) -> list[int]:
    """Which of a row's stored scales each kernel block reads.

    Stored scales cover equal powers of two of kernel blocks, the last of them perhaps fewer.

    Args:
        width: Values in a row.
        block: The kernel's block size.
        stored: Number of scales a row has.

    Examples:
        >>> scale_columns(width=80, block=16, stored=3)
        [0, 0, 1, 1, 2]
        >>> scale_columns(width=768, block=256, stored=1)
        [0, 0, 0]
    """
    blocks = -(-width // block)
    covered = 1
    while -(-blocks // covered) > stored:
        covered *= 2
    return [index // covered for index in range(blocks)]


def pack_rows(codes: Tensor, bits: int, block: int) -> Tensor:
    """Pack each row's codes plus `2^(bits - 1)` into bytes, the first code in the lowest bits.

    Args:
        codes: Signed, shape `[rows, width]`.
        bits: 2, 4 or 8.
        block: Rows are filled up with zeros to a multiple of it.

    Returns:
        `uint8`, shape `[rows, ceil(width / block) * block * bits / 8]`.

    Examples:
        >>> pack_rows(torch.tensor([[-8, 7]]), bits=4, block=4).tolist()
        [[240, 136]]
    """
    missing = -codes.shape[1] % block
    padded = torch.nn.functional.pad(codes.to(torch.int32), (0, missing))
    stored = (padded + (1 << (bits - 1))).reshape(len(codes), -1, 8 // bits)
    places = torch.arange(8 // bits, device=codes.device, dtype=torch.int32) * bits
    return (stored << places).sum(dim=2).to(torch.uint8)


def unpack_rows(packed: Tensor, bits: int, width: int) -> Tensor:
    """Undo `pack_rows`: `int8` codes, shape `[rows, width]`.

    Examples:
        >>> unpack_rows(torch.tensor([[240, 136]], dtype=torch.uint8), bits=4, width=2).tolist()
        [[-8, 7]]
    """
    places = torch.arange(8 // bits, device=packed.device, dtype=torch.int32) * bits
    stored = (packed.to(torch.int32).unsqueeze(2) >> places) & ((1 << bits) - 1)
    codes = stored.flatten(1)[:, :width] - (1 << (bits - 1))
    return codes.to(torch.int8)


def dequantize_rows(packed: Tensor, scale: Tensor, bits: int, block: int, width: int) -> Tensor:
    """The weight in real numbers.

    Args:
        packed: From `pack_rows`.
        scale: `float32`, shape `[rows, scales]`, as the format stores them.
        bits: Of the codes.
        block: The kernel's block size.
        width: Values in a row.

    Returns:
        `float32`, shape `[rows, width]`.

    Examples:
        >>> packed = torch.tensor([[240, 136]], dtype=torch.uint8)
        >>> dequantize_rows(packed, torch.tensor([[0.5]]), bits=4, block=16, width=2)
        tensor([[-4.0000,  3.5000]])
    """
    columns = scale_columns(width, block, scale.shape[1])
    spread = scale[:, columns].repeat_interleave(block, dim=1)[:, :width]
    return unpack_rows(packed, bits, width).to(scale.dtype) * spread
