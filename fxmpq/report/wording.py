"""How reports write numbers: one way in tables, pictures and pages."""

from __future__ import annotations

from collections.abc import Mapping

_UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def counted(value: float, unit: str = "") -> str:
    """A count with three digits and a decimal prefix.

    Examples:
        >>> counted(162168, "B"), counted(1548673024), counted(12)
        ('162 kB', '1.55 G', '12')
    """
    for size, prefix in _UNITS:
        if value >= size:
            scaled = value / size
            digits = 0 if scaled >= 99.5 else 1 if scaled >= 9.95 else 2
            return f"{scaled:.{digits}f} {prefix}{unit}"
    return f"{value:.0f} {unit}".rstrip()


def decibels(value: float | None) -> str:
    """An SQNR; `None` stands for no difference at all.

    Examples:
        >>> decibels(23.456), decibels(None)
        ('23.5 dB', 'exact')
    """
    return "exact" if value is None else f"{value:.1f} dB"


def percent(share: float, digits: int = 1) -> str:
    """A share as a percentage.

    Examples:
        >>> percent(0.1498)
        '15.0 %'
    """
    return f"{100 * share:.{digits}f} %"


def points(difference: float) -> str:
    """A difference of two shares in percentage points, signed.

    Examples:
        >>> points(-0.0025)
        '-0.25'
    """
    return f"{100 * difference:+.2f}"


def change(ratio: float) -> str:
    """A relative difference as a signed percentage.

    Examples:
        >>> change(0.0123), change(-0.5)
        ('+1.2 %', '-50.0 %')
    """
    return f"{100 * ratio:+.1f} %"


def seconds(times: Mapping[str, float]) -> str:
    """Times per step on one line, with their sum.

    Examples:
        >>> seconds({"trace": 1.0, "solve": 0.25})
        'trace 1.0 s, solve 0.2 s: 1.2 s in all'
    """
    listed = ", ".join(f"{step} {time:.1f} s" for step, time in times.items())
    return f"{listed}: {sum(times.values()):.1f} s in all"


def shortened(name: str, length: int = 32) -> str:
    """A layer's name with the first parts of its path cut to a letter where it is long.

    Examples:
        >>> shortened("bert.encoder.layer.10.attention.output.dense")
        'b.e.l.10.attention.output.dense'
    """
    parts = name.split(".")
    for position in range(len(parts) - 1):
        if len(".".join(parts)) <= length:
            break
        # A number tells which block it is.
        if not parts[position].isdigit():
            parts[position] = parts[position][:1]
    return ".".join(parts)
