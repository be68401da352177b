"""Codes of any format: nearest ones, and the numbers they stand for."""

from __future__ import annotations

import torch
from torch import Tensor

from fxmpq.formats import NumberFormat
from fxmpq.quantizers.floating import float_codes, float_values, round_to_float


def code_dtype(number_format: NumberFormat) -> torch.dtype:
    """In which codes are held: `int8` up to 8 bits and `int16` above, `uint8` for floats."""
    if not number_format.is_integer:
        return torch.uint8
    return torch.int8 if number_format.bits <= 8 else torch.int16


def nearest_codes(weight: Tensor, scale: Tensor, number_format: NumberFormat) -> Tensor:
    """The codes whose numbers lie nearest to a weight.

    Integers: `q = clamp(round(w / scale), qmin, qmax)`, half to even. Floats: the bit pattern of
    `round_to_float(w / scale)`.

    Args:
        weight: Any shape.
        scale: Positive, broadcasts against `weight`.
        number_format: Symmetric or of a float.

    Returns:
        In `code_dtype`, with the shape of `weight`.

    Examples:
        >>> nearest_codes(torch.tensor([0.1, -0.2]), torch.tensor(0.1), NumberFormat(2))
        tensor([ 1, -2], dtype=torch.int8)
    """
    if not number_format.is_integer:
        return float_codes(weight / scale, number_format.scheme)
    codes = torch.round(weight / scale).clamp_(number_format.qmin, number_format.qmax)
    return codes.to(code_dtype(number_format))


def dequantize(codes: Tensor, scale: Tensor, number_format: NumberFormat) -> Tensor:
    """Turn codes back to real numbers: `w = scale * q`, or `scale * value(q)` for floats.

    Args:
        codes: Of any shape.
        scale: Broadcasts against `codes`.
        number_format: Of the codes.

    Returns:
        A tensor in the dtype of `scale`.

    Examples:
        >>> dequantize(torch.tensor([1, -2], dtype=torch.int8), torch.tensor(0.5), NumberFormat(2))
        tensor([ 0.5000, -1.0000])
    """
    if not number_format.is_integer:
        return float_values(codes, number_format.scheme).to(scale.dtype) * scale
    return codes.to(scale.dtype) * scale


def round_in_place(values: Tensor, number_format: NumberFormat) -> Tensor:
    """Replace values in units of their scale by the nearest ones that the format has.

    What `nearest_codes` and `dequantize` do together with a scale of 1, without the codes.

    Args:
        values: Changed in place.
        number_format: Symmetric or of a float.

    Returns:
        `values`.

    Examples:
        >>> round_in_place(torch.tensor([0.6, 9.0]), NumberFormat(2))
        tensor([1., 1.])
    """
    if not number_format.is_integer:
        return values.copy_(round_to_float(values, number_format.scheme))
    return values.round_().clamp_(number_format.qmin, number_format.qmax)
