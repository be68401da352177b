"""Number formats and precisions: the vocabulary that every step shares."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum

from fxmpq.errors import PrecisionError

_INTEGER_BITS = (2, 3, 4, 5, 6, 7, 8, 16)
_PRECISION = re.compile(r"w(?P<weight>\d+)(?:a(?P<activation>\d+))?")


class Scheme(Enum):
    """How integer codes map to real numbers.

    `SYMMETRIC` codes are signed and the zero point is 0: `x = scale * code`.
    `AFFINE` codes are unsigned: `x = scale * (code - zero_point)`.
    """

    SYMMETRIC = "symmetric"
    AFFINE = "affine"


@dataclass(frozen=True)
class NumberFormat:
    """The integer format in which one tensor's codes are stored.

    A code `q` of a `bits`-wide format lies in `[qmin, qmax]`, which is
    `[-2^(bits-1), 2^(bits-1) - 1]` when symmetric and `[0, 2^bits - 1]` when affine.

    Args:
        bits: Width of one code, one of 2, 3, 4, 5, 6, 7, 8, 16.
        scheme: Whether the codes are symmetric or affine.

    Raises:
        PrecisionError: If there is no such width.

    Examples:
        >>> NumberFormat(4).qmin, NumberFormat(4).qmax
        (-8, 7)
        >>> NumberFormat(8, Scheme.AFFINE).name
        'uint8'
    """

    bits: int
    scheme: Scheme = Scheme.SYMMETRIC

    def __post_init__(self) -> None:
        if self.bits not in _INTEGER_BITS:
            legal = ", ".join(str(bits) for bits in _INTEGER_BITS)
            raise PrecisionError(f"no {self.bits}-bit integer format; legal widths are {legal}")

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
    def name(self) -> str:
        """`int4`, `uint8` and the like."""
        return f"{'int' if self.scheme is Scheme.SYMMETRIC else 'uint'}{self.bits}"


@dataclass(frozen=True)
class Precision:
    """A weight width and an activation width, as in `w4a8`; `None` stands for float.

    `Precision.parse` reads the names people write: `w4a8` (4-bit weights, 8-bit
    activations), `w4` (weight-only, activations stay float) and `fp32` (all float).
    Weights are symmetric per output channel, activations affine per tensor.

    Args:
        weight_bits: Width of the weight codes, or `None` for float.
        activation_bits: Width of the activation codes, or `None` for float.

    Raises:
        PrecisionError: If a width does not exist, or only the activation has one.

    Examples:
        >>> Precision.parse("w4a8")
        Precision(weight_bits=4, activation_bits=8)
        >>> str(Precision.parse("w4")), str(Precision())
        ('w4', 'fp32')
    """

    weight_bits: int | None = None
    activation_bits: int | None = None

    def __post_init__(self) -> None:
        if self.weight_bits is None and self.activation_bits is not None:
            raise PrecisionError(
                f"activations at {self.activation_bits} bits with float weights is not a "
                "precision; write for example 'w8a8', 'w4' or 'fp32'"
            )
        for bits in (self.weight_bits, self.activation_bits):
            if bits is not None:
                NumberFormat(bits)

    @classmethod
    def parse(cls, text: str | Precision) -> Precision:
        """Read `w4a8`, `w4` or `fp32`; a `Precision` is returned as it is."""
        if isinstance(text, Precision):
            return text
        name = text.strip().lower()
        if name == "fp32":
            return cls()
        match = _PRECISION.fullmatch(name)
        if match is None:
            raise PrecisionError(
                f"cannot read the precision {text!r}; write 'w<bits>a<bits>' as in 'w4a8', "
                "'w<bits>' for weight-only as in 'w4', or 'fp32'"
            )
        activation = match["activation"]
        return cls(int(match["weight"]), None if activation is None else int(activation))

    def __str__(self) -> str:
        if self.weight_bits is None:
            return "fp32"
        suffix = "" if self.activation_bits is None else f"a{self.activation_bits}"
        return f"w{self.weight_bits}{suffix}"

    @property
    def weight(self) -> NumberFormat | None:
        """Format of the weight codes: symmetric, or `None` for float."""
        return None if self.weight_bits is None else NumberFormat(self.weight_bits)

    @property
    def activation(self) -> NumberFormat | None:
        """Format of the activation codes: affine, or `None` for float."""
        if self.activation_bits is None:
            return None
        return NumberFormat(self.activation_bits, Scheme.AFFINE)

    @property
    def weight_only(self) -> Precision:
        """The same weights with float activations."""
        return Precision(self.weight_bits)

    @property
    def is_float(self) -> bool:
        """Whether nothing is quantized."""
        return self.weight_bits is None

    @property
    def sort_key(self) -> tuple[int, int]:
        """Orders precisions from few bits to many; float counts 32."""
        return (self.weight_bits or 32, self.activation_bits or 32)
