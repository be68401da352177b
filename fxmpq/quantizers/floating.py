"""Small floating-point numbers: rounding to them, and their bit patterns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fxmpq.formats import NumberFormat, Scheme

_FLOAT32_MANTISSA = 23
_FLOAT32_BIAS = 127
_FLOAT32_EXPONENT = 0xFF << _FLOAT32_MANTISSA


@dataclass(frozen=True)
class FloatLayout:
    """The bits of a small float: a sign, then exponent bits, then mantissa bits.

    With exponent field `e`, mantissa field `m` of `M` bits and bias `B`, the value is
    `2^(e - B) (1 + m / 2^M)`, or `2^(1 - B) m / 2^M` if `e = 0` (subnormal).

    Args:
        mantissa_bits: `M`.
        bias: `B`.
        largest: The largest finite value.
    """

    mantissa_bits: int
    bias: int
    largest: float

    @property
    def smallest_normal(self) -> float:
        """`2^(1 - B)`; below it values are evenly spaced."""
        return 2.0 ** (1 - self.bias)


_LAYOUTS = {
    Scheme.E4M3: FloatLayout(mantissa_bits=3, bias=7, largest=448.0),
    Scheme.E5M2: FloatLayout(mantissa_bits=2, bias=15, largest=57344.0),
    Scheme.E2M1: FloatLayout(mantissa_bits=1, bias=1, largest=6.0),
}


def float_layout(scheme: Scheme) -> FloatLayout:
    """The layout of a float scheme."""
    return _LAYOUTS[scheme]


def power_of_two(exponent: Tensor) -> Tensor:
    """`2^exponent`, exactly, which `torch.exp2` and `torch.ldexp` do not promise.

    Args:
        exponent: Integers from -126 to 127.

    Returns:
        `float32` like `exponent`.

    Examples:
        >>> power_of_two(torch.tensor([-1, 0, 10]))
        tensor([5.0000e-01, 1.0000e+00, 1.0240e+03])
    """
    bits = (exponent.to(torch.int32) + _FLOAT32_BIAS) << _FLOAT32_MANTISSA
    return bits.view(torch.float32)


def exponent_of(x: Tensor) -> Tensor:
    """`floor(log2 x)` of positive normal `float32` numbers, exactly, as `int32`.

    Examples:
        >>> exponent_of(torch.tensor([0.5, 1.0, 3.9]))
        tensor([-1,  0,  1], dtype=torch.int32)
    """
    return ((x.view(torch.int32) & _FLOAT32_EXPONENT) >> _FLOAT32_MANTISSA) - _FLOAT32_BIAS


def round_to_float(x: Tensor, scheme: Scheme) -> Tensor:
    """Round to the nearest small float, half to even, saturating.

    Between the powers of two `2^e` and `2^(e+1)` values lie `2^(e - M)` apart, and below the
    smallest normal number as far as just above it. What exceeds the largest finite value becomes
    it, with its sign. This is the saturating conversion of the Open Compute Project's formats
    (OFP8, Micikevicius et al. 2022, arXiv:2209.05433; MX, Rouhani et al. 2023,
    arXiv:2310.10537). Exact in `float32`, in which other dtypes are computed; NaN stays.

    Args:
        x: Any shape.
        scheme: `E4M3`, `E5M2` or `E2M1`.

    Returns:
        `float32`, like `x`; negative values that round to zero give -0.

    Examples:
        >>> round_to_float(torch.tensor([0.3, 2.5, 5.1, -100.0]), Scheme.E2M1)
        tensor([ 0.5000,  2.0000,  6.0000, -6.0000])
    """
    layout = _LAYOUTS[scheme]
    values = x.float().clamp(-layout.largest, layout.largest)
    # The exponent bits alone are the power of two below the value.
    power = (values.view(torch.int32) & _FLOAT32_EXPONENT).view(torch.float32)
    spacing = power.clamp_(min=layout.smallest_normal).mul_(2.0**-layout.mantissa_bits)
    return torch.div(values, spacing).round_().mul_(spacing).copysign_(values)


def float_codes(x: Tensor, scheme: Scheme) -> Tensor:
    """Round to the nearest small float and return its bit pattern.

    Args:
        x: Finite, any shape.
        scheme: `E4M3`, `E5M2` or `E2M1`.

    Returns:
        `uint8` like `x`: sign, exponent and mantissa from the highest bit of the format down.

    Examples:
        >>> float_codes(torch.tensor([0.0, 0.5, 1.0, 6.0, -6.0]), Scheme.E2M1)
        tensor([ 0,  1,  2,  7, 15], dtype=torch.uint8)
    """
    layout = _LAYOUTS[scheme]
    rounded = round_to_float(x, scheme)
    magnitude = rounded.abs()
    shift = _FLOAT32_MANTISSA - layout.mantissa_bits
    # A float32 has the same fields with more bits and another bias.
    normal = (magnitude.view(torch.int32) >> shift) - (
        (_FLOAT32_BIAS - layout.bias) << layout.mantissa_bits
    )
    unit = layout.smallest_normal * 2.0**-layout.mantissa_bits
    subnormal = (magnitude / unit).to(torch.int32)
    code = torch.where(magnitude < layout.smallest_normal, subnormal, normal)
    sign = torch.signbit(rounded).to(torch.int32) << (_bits(scheme) - 1)
    return (code | sign).to(torch.uint8)


def float_values(codes: Tensor, scheme: Scheme) -> Tensor:
    """What bit patterns stand for.

    Args:
        codes: `uint8` of any shape, smaller than `2^bits`.
        scheme: `E4M3`, `E5M2` or `E2M1`.

    Returns:
        `float32` like `codes`; patterns that are no finite number, which `float_codes` never
        gives, are NaN or infinite as the format has them.

    Examples:
        >>> float_values(torch.arange(8, dtype=torch.uint8), Scheme.E2M1)
        tensor([0.0000, 0.5000, 1.0000, 1.5000, 2.0000, 3.0000, 4.0000, 6.0000])
    """
    return _table(scheme, codes.device)[codes.to(torch.int32)]


def fake_quantize_float(x: Tensor, scale: float, number_format: NumberFormat) -> Tensor:
    """Round an activation to `scale` times small floats, returned in real numbers.

    `x_q = scale * round_to_float(x / scale)`; the gradient is 1 where `|x|` is at most `scale`
    times the largest finite value and 0 outside (straight-through).

    Args:
        x: Any shape.
        scale: Positive.
        number_format: Of a float.

    Returns:
        A tensor like `x`.

    Examples:
        >>> e2m1 = NumberFormat(4, Scheme.E2M1)
        >>> fake_quantize_float(torch.tensor([-9.0, 0.4, 1.0]), 0.5, e2m1)
        tensor([-3.0000,  0.5000,  1.0000])
    """
    scheme = number_format.scheme
    rounded = (round_to_float(x.detach() / scale, scheme) * scale).to(x.dtype)
    if not (torch.is_grad_enabled() and x.requires_grad):
        return rounded
    limit = _LAYOUTS[scheme].largest * scale
    inside = x.clamp(-limit, limit)
    return rounded + (inside - inside.detach())


def _bits(scheme: Scheme) -> int:
    return 4 if scheme is Scheme.E2M1 else 8


def _table(scheme: Scheme, device: torch.device) -> Tensor:
    """The value of every bit pattern."""
    layout = _LAYOUTS[scheme]
    codes = torch.arange(1 << (_bits(scheme) - 1), device=device)
    fields, mantissa = codes >> layout.mantissa_bits, codes & ((1 << layout.mantissa_bits) - 1)
    fraction = mantissa * 2.0**-layout.mantissa_bits
    normal = power_of_two(fields - layout.bias) * (1 + fraction)
    values = torch.where(fields > 0, normal, fraction * layout.smallest_normal)
    if scheme is Scheme.E4M3:
        values[-1] = torch.nan
    if scheme is Scheme.E5M2:
        values[-4] = torch.inf
        values[-3:] = torch.nan
    return torch.cat([values, -values])
