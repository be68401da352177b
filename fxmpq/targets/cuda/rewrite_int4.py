"""Weight-only layers of 4 bits and less on `_weight_int4pack_mm`."""

from __future__ import annotations

import torch
from torch import Tensor

from fxmpq.quantizers.ranges import ActivationRange
from fxmpq.targets.cuda.arithmetic import int4_product
from fxmpq.targets.cuda.kernels import int4_block
from fxmpq.targets.cuda.operands import Operands, filled_up, trial_row
from fxmpq.targets.cuda.shape_rules import Kernel
from fxmpq.targets.cuda.weighted import WeightedLayer

_MIDDLE = 8
"""The unsigned code of 0.0: the kernel computes `(code - 8) * scale + zero`."""

_TILE = 16
_TILES = (8, 4, 2)


def int4_operands(found: WeightedLayer, kernel: Kernel, grid: ActivationRange | None) -> Operands:
    """What `int4_product` computes a layer with.

    Args:
        found: With integer weights of at most 4 bits, narrower ones widened; scales of channels
            and tensors are repeated for each block. Scales are rounded to `bfloat16`.
        kernel: With the sizes it takes.
        grid: Not read: activations stay float.
    """
    rows, device = found.rows, found.codes.device
    values = rows.shape[1]
    block = int4_block(found.precision, values)
    inner, outer = kernel.alignments[device.type].padded(values + -values % block, rows.shape[0])
    blocks = inner // block
    scale = found.scale if found.scale.dim() == 2 else found.scale.reshape(-1, 1)
    scale = filled_up(scale.expand(rows.shape[0], blocks), (outer, blocks))
    pairs = torch.stack([scale, torch.zeros_like(scale)], dim=-1)
    tensors = {
        "packed": packed_int4(filled_up(rows, (outer, inner))),
        "scales": pairs.transpose(0, 1).to(torch.bfloat16).contiguous(),
        "bias": None if found.bias is None else found.bias,
    }
    settings = ((inner, rows.shape[0]), block, found.dtype)
    row = trial_row(values, device)
    return Operands(int4_product, tensors, settings, row.to(found.dtype), row)


def packed_int4(codes: Tensor) -> Tensor:
    """Pack codes as the kernel of their device wants them.

    Args:
        codes: `int8` in `[-8, 7]`, `[out, in]`, `in` a multiple of 32.
    """
    unsigned = codes.to(torch.int32) + _MIDDLE
    if codes.device.type == "cpu":
        return torch._convert_weight_to_int4pack_for_cpu(unsigned, 1)
    tiles = next(count for count in _TILES if codes.shape[1] % (count * _TILE) == 0)
    return torch._convert_weight_to_int4pack(in_pairs(unsigned), tiles)


def in_pairs(unsigned: Tensor) -> Tensor:
    """Two codes a byte, the first of each pair in the upper half.

    Args:
        unsigned: Codes in `[0, 15]`, `[out, in]`.

    Examples:
        >>> in_pairs(torch.tensor([[1, 2, 15, 0]])).tolist()
        [[18, 240]]
    """
    first, second = unsigned.reshape(unsigned.shape[0], -1, 2).unbind(-1)
    return (first << 4 | second).to(torch.uint8)
