"""Layers of 8-bit activations on `_int_mm`."""

from __future__ import annotations

import torch

from fxmpq.quantizers.ranges import ActivationRange
from fxmpq.targets.cuda.arithmetic import int8_product
from fxmpq.targets.cuda.operands import Operands, filled_up, float_bias, product_scale, trial_row
from fxmpq.targets.cuda.shape_rules import Kernel
from fxmpq.targets.cuda.weighted import WeightedLayer

SIGNED = 128
"""What is subtracted from unsigned codes and zero points, since the kernel reads signed ones."""


def int8_operands(found: WeightedLayer, kernel: Kernel, grid: ActivationRange | None) -> Operands:
    """What `int8_product` computes a layer with.

    With codes `q_x - 128` and the zero point `z = z_x - 128`, a layer is
    `y = s_x s_w (W q) + (b - s_x s_w z sum_k W_k)`: the zero point is settled in the bias.

    Args:
        found: With integer weights of at most 8 bits; narrower ones are widened.
        kernel: With the sizes it takes.
        grid: The activation's, of unsigned 8-bit codes.
    """
    assert grid is not None
    rows, device = found.rows, found.codes.device
    alignment = kernel.alignments[device.type]
    outer, inner = rows.shape
    inner, outer = alignment.padded(inner, outer)
    scale = product_scale(found, grid)
    zero_point = grid.zero_point - SIGNED
    bias = float_bias(found) - scale * zero_point * rows.sum(1, dtype=torch.int64)
    tensors = {
        "weight": filled_up(rows, (outer, inner)),
        "scale": scale.float(),
        "bias": bias.float(),
    }
    settings = (alignment.rows, found.dtype)
    # Over the whole range of codes, so that sums outweigh what is settled in the bias.
    row = trial_row(rows.shape[1], device) * 42
    numbers = (row - zero_point) * grid.scale
    return Operands(int8_product, tensors, settings, row.to(torch.int8), numbers, zero_point)
