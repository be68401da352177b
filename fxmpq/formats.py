"""Number formats and precisions: the vocabulary that every step shares."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from enum import Enum

from fxmpq.errors import PrecisionError
from fxmpq.granularity import (
    Dynamic,
    Granularity,
    PerBlock,
    PerChannel,
    PerTensor,
    dynamic_suffix,
    granularity_suffix,
    read_dynamic,
)

_INTEGER_BITS = (2, 3, 4, 5, 6, 7, 8, 16)
_FORMAT = r"\d+|e4m3|e5m2|e2m1"
_WEIGHT = rf"w(?P<weight>{_FORMAT})(?:(?P<tensor>t)|b(?P<block>\d+))?"
_PRECISION = re.compile(rf"(?=.)(?:{_WEIGHT})?(?:a(?P<activation>{_FORMAT})(?P<dynamic>dt?)?)?")


class Scheme(Enum):
    """How codes map to real numbers.

    `SYMMETRIC` codes are signed integers and the zero point is 0: `x = scale * code`.
    `AFFINE` codes are unsigned: `x = scale * (code - zero_point)`.
    `E4M3`, `E5M2` and `E2M1` codes are bit patterns of small floating-point numbers, named after
    their exponent and mantissa bits: `x = scale * value(code)`. They are those of the Open
    Compute Project: `E4M3` has no infinity (torch's `float8_e4m3fn`), `E2M1` neither infinity
    nor NaN.
    """

    SYMMETRIC = "symmetric"
    AFFINE = "affine"
    E4M3 = "e4m3"
    E5M2 = "e5m2"
    E2M1 = "e2m1"


_FLOAT_BITS = {Scheme.E4M3: 8, Scheme.E5M2: 8, Scheme.E2M1: 4}


class ScaleKind(Enum):
    """How a tensor's scales are stored.

    `FLOAT32` takes 4 bytes a scale. `E8M0` is a power of two in one byte, that of the MX formats
    of the Open Compute Project. `E4M3` is a byte too, times one power of two for the whole
    tensor, held in `float32`: that of NVFP4.
    """

    FLOAT32 = "float32"
    E8M0 = "e8m0"
    E4M3 = "e4m3"


@dataclass(frozen=True)
class NumberFormat:
    """The format in which one tensor's codes and scales are stored.

    A code of a `bits`-wide format lies in `[qmin, qmax]`: `[-2^(bits-1), 2^(bits-1) - 1]` when
    symmetric, `[0, 2^bits - 1]` when affine, or for the bit patterns of a float.

    Args:
        bits: Width of one code, one of 2, 3, 4, 5, 6, 7, 8, 16; a float's is its own.
        scheme: What the codes mean.
        granularity: How many values share a scale. Affine formats are of activations and have
            one per tensor; their default stands for that.
        dynamic: What a range that is found at every run covers; `None` if calibration finds it.

    Raises:
        PrecisionError: If there is no such width, affine codes are in blocks, or others dynamic.

    Examples:
        >>> NumberFormat(4).qmin, NumberFormat(4).qmax
        (-8, 7)
        >>> NumberFormat(8, Scheme.AFFINE).name
        'uint8'
        >>> NumberFormat(4, Scheme.E2M1, PerBlock(32)).name
        'fp4_e2m1b32'
    """

    bits: int
    scheme: Scheme = Scheme.SYMMETRIC
    granularity: Granularity = PerChannel()
    dynamic: Dynamic | None = None

    def __post_init__(self) -> None:
        width = _FLOAT_BITS.get(self.scheme)
        if width not in (None, self.bits):
            raise PrecisionError(
                f"{self.scheme.value} codes are {width} bits wide, not {self.bits}"
            )
        if self.bits not in _INTEGER_BITS:
            legal = ", ".join(str(bits) for bits in _INTEGER_BITS)
            raise PrecisionError(f"no {self.bits}-bit integer format; legal widths are {legal}")
        if self.scheme is Scheme.AFFINE:
            if isinstance(self.granularity, PerBlock):
                raise PrecisionError(
                    f"affine codes have one scale per tensor, not per block of "
                    f"{self.granularity.size}; weights are symmetric"
                )
            object.__setattr__(self, "granularity", PerTensor())
        elif self.dynamic is not None:
            raise PrecisionError(
                f"only integer activations find a range at run time, not {self.scheme.value} codes"
            )

    @property
    def is_integer(self) -> bool:
        """Whether codes are integers on an even grid; a float format's steps grow instead."""
        return self.scheme not in _FLOAT_BITS

    @property
    def has_fixed_grid(self) -> bool:
        """Whether codes lie on one even grid at every run, so that methods can learn its step."""
        return self.is_integer and self.dynamic is None

    @property
    def qmin(self) -> int:
        """Smallest code."""
        return -(1 << (self.bits - 1)) if self.scheme is Scheme.SYMMETRIC else 0

    @property
    def qmax(self) -> int:
        """Largest code."""
        if self.scheme is Scheme.SYMMETRIC:
            return (1 << (self.bits - 1)) - 1
        return (1 << self.bits) - 1

    @property
    def scale_kind(self) -> ScaleKind:
        """How scales are stored: as hardware that computes in the format wants them.

        Floats in blocks of 32 have power-of-two scales (MXFP8, MXFP4), `E2M1` in blocks of 16 has
        E4M3 scales (NVFP4), everything else has `float32` scales.
        """
        if not self.is_integer and self.granularity == PerBlock(32):
            return ScaleKind.E8M0
        if self.scheme is Scheme.E2M1 and self.granularity == PerBlock(16):
            return ScaleKind.E4M3
        return ScaleKind.FLOAT32

    @property
    def name(self) -> str:
        """`int4`, `uint8`, `uint8d`, `int4b32`, `int4t`, `fp8_e4m3` and the like."""
        if self.scheme is Scheme.AFFINE:
            return f"uint{self.bits}{dynamic_suffix(self.dynamic)}"
        kind = "int" + _kind(self) if self.is_integer else f"fp{self.bits}_{_kind(self)}"
        return kind + granularity_suffix(self.granularity)


@dataclass(frozen=True, init=False, repr=False)
class Precision:
    """A weight format and an activation format, as in `w4a8`; `None` stands for float.

    `Precision.parse` reads the names people write, `w<format>[<granularity>][a<format>]`,
    `a<format>` and `fp32` (all float). A format is the width of an integer (`4`) or a small float
    (`e4m3`, `e5m2`, `e2m1`). The granularity says how many weights share a scale: those of an
    output channel if it is left out, `t` the whole tensor, `b32` blocks of 32. Activations have
    one scale per tensor; without `a<format>` they stay float. Their ranges are calibrated, unless
    `d` behind an integer asks for one per tensor and run, or `dt` for one per row of its last
    dimension (a token) and run. So `w4a8` has 4-bit weights and 8-bit activations, `w4b128`
    4-bit weights in blocks of 128, `we4m3ae4m3` 8-bit floats. What has no weight, a product of two
    activations, is at `a8`: both operands in 8 bits.

    Args:
        weight: Format of the weight codes, or the width of a symmetric integer one with a scale
            per channel, or `None` for float.
        activation: Format of the activation codes, or the width of an affine integer one, or
            `None` for float.

    Raises:
        PrecisionError: If a width does not exist, or a format does not suit its place.

    Examples:
        >>> Precision.parse("w4a8") == Precision(4, 8)
        True
        >>> str(Precision.parse("w4")), str(Precision())
        ('w4', 'fp32')
        >>> Precision.parse("we2m1b32a8d").weight.name
        'fp4_e2m1b32'
    """

    weight: NumberFormat | None
    activation: NumberFormat | None

    def __init__(
        self,
        weight: int | NumberFormat | None = None,
        activation: int | NumberFormat | None = None,
    ) -> None:
        if isinstance(activation, int):
            activation = NumberFormat(activation, Scheme.AFFINE)
        if isinstance(weight, int):
            weight = NumberFormat(weight)
        if weight is not None and weight.scheme is Scheme.AFFINE:
            raise PrecisionError(f"weights are symmetric or floats, not {weight.name}")
        if activation is not None and (
            activation.scheme is Scheme.SYMMETRIC or activation.granularity != PerTensor()
        ):
            raise PrecisionError(
                "activations are affine or floats with one scale per tensor, not "
                f"{activation.name}; write for example 'w8a8' or 'we4m3ae4m3'"
            )
        object.__setattr__(self, "weight", weight)
        object.__setattr__(self, "activation", activation)

    @classmethod
    def parse(cls, text: str | Precision) -> Precision:
        """Read `w4a8`, `w4b32`, `we4m3ae4m3`, `a8` or `fp32`; a `Precision` is returned as is."""
        if isinstance(text, Precision):
            return text
        name = text.strip().lower()
        if name == "fp32":
            return cls()
        match = _PRECISION.fullmatch(name)
        if match is None:
            raise PrecisionError(
                f"cannot read the precision {text!r}; write 'w<format>a<format>' as in 'w4a8' or "
                "'we4m3ae4m3', 'w<format>' for weight-only as in 'w4', with 't' (per tensor) or "
                "'b<size>' (per block) behind the weight's format as in 'w4b32a8', 'd' (a range "
                "per run) or 'dt' (per row and run) behind an integer activation as in 'w8a8d', "
                "'a<format>' for a product of two activations as in 'a8', or 'fp32'"
            )
        granularity: Granularity = PerBlock(int(match["block"])) if match["block"] else PerChannel()
        weight = None
        if match["weight"] is not None:
            weight = _read(match["weight"], PerTensor() if match["tensor"] else granularity)
        if match["activation"] is None:
            return cls(weight)
        read = _read(match["activation"], PerTensor())
        scheme = Scheme.AFFINE if read.is_integer else read.scheme
        return cls(weight, replace(read, scheme=scheme, dynamic=read_dynamic(match["dynamic"])))

    def __str__(self) -> str:
        text = ""
        if self.weight is not None:
            text = f"w{_kind(self.weight)}{granularity_suffix(self.weight.granularity)}"
        if self.activation is not None:
            text += f"a{_kind(self.activation)}"
        return text or "fp32"

    def __repr__(self) -> str:
        return f"Precision.parse({str(self)!r})"

    @property
    def weight_bits(self) -> int | None:
        """Width of the weight codes, or `None` for float."""
        return None if self.weight is None else self.weight.bits

    @property
    def activation_bits(self) -> int | None:
        """Width of the activation codes, or `None` for float."""
        return None if self.activation is None else self.activation.bits

    @property
    def weight_only(self) -> Precision:
        """The same weights with float activations."""
        return Precision(self.weight)

    @property
    def activation_only(self) -> Precision:
        """The same activations without weights, as a product of two activations has them."""
        return Precision(None, self.activation)

    @property
    def is_float(self) -> bool:
        """Whether nothing is quantized."""
        return self.weight is None and self.activation is None

    @property
    def sort_key(self) -> tuple[int, int, int, str]:
        """Orders precisions from few bits to many, then from few scales to many.

        The first two entries are the widths of weights and activations; float counts 32.
        """
        granularity = None if self.weight is None else self.weight.granularity
        # Fewer than 2^32 values share a scale, whatever the block; a channel counts as more.
        sharing = granularity.size if isinstance(granularity, PerBlock) else 1 << 32
        sharing += isinstance(granularity, PerTensor)
        return (self.weight_bits or 32, self.activation_bits or 32, -sharing, str(self))


def _read(text: str, granularity: Granularity) -> NumberFormat:
    """The weight format that a part of a precision's name stands for."""
    if text.isdecimal():
        return NumberFormat(int(text), Scheme.SYMMETRIC, granularity)
    scheme = Scheme(text)
    return NumberFormat(_FLOAT_BITS[scheme], scheme, granularity)


def _kind(number_format: NumberFormat) -> str:
    kind = str(number_format.bits) if number_format.is_integer else number_format.scheme.value
    return kind + dynamic_suffix(number_format.dynamic)
