"""Layers of E4M3 weights and activations on `_scaled_mm`."""

from __future__ import annotations

import torch

from fxmpq.quantizers.ranges import ActivationRange
from fxmpq.targets.cuda.arithmetic import e4m3_product, to_e4m3
from fxmpq.targets.cuda.operands import Operands, filled_up, float_bias, product_scale, trial_row
from fxmpq.targets.cuda.shape_rules import Kernel
from fxmpq.targets.cuda.weighted import WeightedLayer


def e4m3_operands(found: WeightedLayer, kernel: Kernel, grid: ActivationRange | None) -> Operands:
    """What `e4m3_product` computes a layer with.

    Args:
        found: With weights in E4M3.
        kernel: With the sizes it takes.
        grid: The activation's.
    """
    assert grid is not None
    rows, device = found.rows, found.codes.device
    outer, inner = rows.shape
    inner, outer = kernel.alignments[device.type].padded(inner, outer)
    tensors = {
        "weight": filled_up(rows, (outer, inner)),
        "scale": product_scale(found, grid).float(),
        "bias": float_bias(found).float(),
        "one": torch.ones((), device=device),
    }
    row = trial_row(rows.shape[1], device)
    return Operands(e4m3_product, tensors, (found.dtype,), to_e4m3(row, 1.0), row * grid.scale)
