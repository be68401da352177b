"""Grids of activations: the scale and the zero point with which codes reach a range."""

from __future__ import annotations

import torch
from torch import Tensor

from fxmpq.formats import NumberFormat
from fxmpq.quantizers.floating import float_layout

SMALLEST_SCALE = float(torch.finfo(torch.float32).tiny)
"""Of a range of denormal width, whose step would be zero."""


def middle_code(number_format: NumberFormat) -> int:
    """The zero point of symmetric ranges: `2^(bits - 1)` of affine codes, 0 of a float's.

    Affine codes less this are the signed codes `[-2^(bits - 1), 2^(bits - 1) - 1]`.

    Examples:
        >>> from fxmpq.formats import Scheme
        >>> middle_code(NumberFormat(8, Scheme.AFFINE)), middle_code(NumberFormat(8, Scheme.E4M3))
        (128, 0)
    """
    return 1 << (number_format.bits - 1) if number_format.is_integer else 0


def grids(
    lows: Tensor, highs: Tensor, number_format: NumberFormat, is_symmetric: bool
) -> tuple[Tensor, Tensor]:
    """Scales (rounded to `float32`, held in `float64`) and zero points of ranges.

    Affine: `scale = (high - low) / (qmax - qmin)` and `zero_point = round(-low / scale)`, so that
    zero is exactly a code, and code 0 where `low` is 0: runtimes then absorb a preceding ReLU.
    Symmetric: `zero_point = 2^(bits - 1)` and
    `scale = max(high / (2^(bits - 1) - 1), -low / 2^(bits - 1))`, the smallest that reaches both
    ends. A float's largest value is the larger magnitude of both ends.

    Args:
        lows: At most 0, `float64`, shape `[ranges]`.
        highs: At least 0, the same shape; no range is empty.
        number_format: Affine, or a float's.
        is_symmetric: Whether the zero point is the middle of affine codes.

    Returns:
        Scales and zero points, `float64`, shape `[ranges]`.

    Examples:
        >>> from fxmpq.formats import Scheme
        >>> ends = torch.tensor([-1.0]).double(), torch.tensor([127.0]).double()
        >>> grids(*ends, NumberFormat(8, Scheme.AFFINE), is_symmetric=True)
        (tensor([1.], dtype=torch.float64), tensor([128.], dtype=torch.float64))
    """
    middle = middle_code(number_format)
    if not number_format.is_integer:
        scale = torch.maximum(-lows, highs) / float_layout(number_format.scheme).largest
    elif is_symmetric:
        scale = torch.maximum(-lows / middle, highs / (middle - 1))
    else:
        scale = (highs - lows) / (number_format.qmax - number_format.qmin)
    scale = scale.float().double().clamp(min=SMALLEST_SCALE)
    if is_symmetric or not number_format.is_integer:
        return scale, torch.full_like(scale, middle)
    zero_point = torch.round(-lows / scale).clamp(number_format.qmin, number_format.qmax)
    return scale, zero_point
