"""Packing codes densely into bytes."""

from __future__ import annotations

import torch
from torch import Tensor


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack two's-complement codes or bit patterns without gaps, least significant bit first.

    Code `i` takes the bits `[i * bits, (i + 1) * bits)` of the byte stream, counted from the
    lowest bit of the first byte; the last byte is filled up with zeros.

    Args:
        codes: Signed codes, or bit patterns of `bits` bits, of any shape; flattened in C order.
        bits: Width of one code.

    Returns:
        `uint8`, shape `[ceil(codes.numel() * bits / 8)]`.

    Examples:
        >>> pack_codes(torch.tensor([1, -1], dtype=torch.int8), 4).tolist()
        [241]
    """
    places = torch.arange(bits, device=codes.device, dtype=torch.int32)
    stream = ((codes.reshape(-1, 1).int() >> places) & 1).reshape(-1)
    padding = -stream.numel() % 8
    stream = torch.cat([stream, stream.new_zeros(padding)]).reshape(-1, 8)
    weights = 1 << torch.arange(8, device=codes.device, dtype=torch.int32)
    return (stream * weights).sum(dim=1).to(torch.uint8)


def unpack_codes(
    packed: Tensor, bits: int, shape: tuple[int, ...], *, signed: bool = True
) -> Tensor:
    """Undo `pack_codes`.

    Args:
        packed: `uint8` bytes.
        bits: Width of one code.
        shape: Of the codes.
        signed: Whether codes are two's-complement numbers; else they are bit patterns of at most
            8 bits.

    Returns:
        Codes, `int8` up to 8 bits and `int16` above; bit patterns `uint8`.

    Examples:
        >>> packed = torch.tensor([241], dtype=torch.uint8)
        >>> unpack_codes(packed, 4, (2,)).tolist(), unpack_codes(packed, 4, (2,), signed=False)
        ([1, -1], tensor([ 1, 15], dtype=torch.uint8))
    """
    count = 1
    for size in shape:
        count *= size
    places = torch.arange(8, device=packed.device, dtype=torch.int32)
    stream = ((packed.int().unsqueeze(1) >> places) & 1).reshape(-1)[: count * bits]
    weights = 1 << torch.arange(bits, device=packed.device, dtype=torch.int32)
    if signed:
        # The highest bit of a two's-complement number counts negative.
        weights[-1] = -weights[-1]
    codes = (stream.reshape(count, bits) * weights).sum(dim=1).reshape(shape)
    if not signed:
        return codes.to(torch.uint8)
    return codes.to(torch.int8 if bits <= 8 else torch.int16)
