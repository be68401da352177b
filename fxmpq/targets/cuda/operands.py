"""A kernel's operands, made once: arranged, filled up and packed as it wants them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx.node import Argument

from fxmpq.quantizers.ranges import ActivationRange
from fxmpq.targets.cuda.arithmetic import dequantized
from fxmpq.targets.cuda.shape_rules import Kernel
from fxmpq.targets.cuda.weighted import WeightedLayer, in_rows

_TOLERANCE = 0.05
"""Error of a trial relative to what products of this size are; bfloat16 makes errors of 0.005."""


@dataclass(frozen=True)
class Operands:
    """A product that can be computed: `multiply(rows, *tensors, *settings)`.

    Args:
        multiply: A function of `arithmetic`.
        tensors: What is stored, by name, in the order of its arguments.
        settings: What follows them.
        row: A row to try it on, `[1, inner]`, in codes.
        numbers: What the row stands for.
        zero: What stands for 0.0 in rows.
    """

    multiply: Callable[..., Tensor]
    tensors: Mapping[str, Tensor | None]
    settings: tuple[Argument, ...]
    row: Tensor
    numbers: Tensor
    zero: int = 0


MakeOperands = Callable[[WeightedLayer, Kernel, ActivationRange | None], Operands]
"""From a layer, the kernel that is to compute it and the grid of its input, if that has one."""


def tried_operands(make: Callable[[], Operands], found: WeightedLayer) -> Operands | str:
    """Make a layer's operands, run its kernel once on a single row, and look at what it returns.

    Shapes that a build or a device does not take are refused by most kernels; some return wrong
    numbers without an error.

    Args:
        make: Makes the operands.
        found: The layer.

    Returns:
        The operands, or what speaks against them.
    """
    try:
        operands = make()
        with torch.no_grad():
            y = operands.multiply(operands.row, *operands.tensors.values(), *operands.settings)
    # Torch's checks raise these two.
    except (RuntimeError, ValueError) as error:
        return str(error).strip().partition("\n")[0]
    weight = in_rows(dequantized(found.codes, found.scale, found.block)).double()
    bias, numbers = float_bias(found), operands.numbers.double()
    difference = (y.double() - numbers @ weight.T - bias).norm()
    usual = numbers.norm() * weight.norm() / weight.shape[1] ** 0.5 + bias.norm()
    # Not `>`, which NaN would pass.
    if not difference <= _TOLERANCE * usual:
        return "it returns wrong numbers"
    return operands


def trial_row(inner: int, device: torch.device) -> Tensor:
    """Numbers to try a kernel on: -3 to 3 in turn, `float32`, `[1, inner]`.

    Examples:
        >>> trial_row(4, torch.device("cpu"))
        tensor([[-3., -2., -1.,  0.]])
    """
    return (torch.arange(inner, device=device) % 7 - 3).float().unsqueeze(0)


def filled_up(matrix: Tensor, shape: tuple[int, int]) -> Tensor:
    """A matrix with zeros to its right and below, up to a shape; bytes of any dtype.

    Examples:
        >>> filled_up(torch.ones(1, 1), (1, 2))
        tensor([[1., 0.]])
    """
    filled = matrix.new_zeros(shape)
    filled[: matrix.shape[0], : matrix.shape[1]] = matrix
    return filled


def product_scale(found: WeightedLayer, grid: ActivationRange) -> Tensor:
    """The scales of a layer's sums, `s_x s_w`, `float64`, one an output channel."""
    outer = found.rows.shape[0]
    return (found.scale.double() * grid.scale).expand(outer)


def float_bias(found: WeightedLayer) -> Tensor:
    """A layer's bias, `float64`; zeros if it has none."""
    if found.bias is None:
        return torch.zeros(found.rows.shape[0], dtype=torch.float64, device=found.scale.device)
    return found.bias.double()
