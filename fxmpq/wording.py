"""How numbers are written: one way in reports, tables, pictures and pages."""

from __future__ import annotations

from collections.abc import Mapping

_LARGER = {"ms": ("s",), "pJ": ("nJ", "µJ", "mJ", "J")}
_NEXT = 999.5  # would be written as 1000
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


def in_unit(value: float, unit: str) -> str:
    """A cost with two or three digits, in the largest unit that leaves it at 1 or more.

    Args:
        value: Of a cost, at least 0.
        unit: `B`, `ms` or `pJ`; without any, counts of a thousand or more have a prefix.

    Examples:
        >>> in_unit(2.5e9, "pJ"), in_unit(12.34, "ms"), in_unit(0.4, ""), in_unit(60_000, "")
        ('2.50 mJ', '12.3 ms', '0.4', '60.0 k')
    """
    if unit in _LARGER:
        for larger in _LARGER[unit]:
            if value < _NEXT:
                break
            value, unit = value / 1000, larger
        if 0 < value < 0.0995:
            return f"{value:.3g} {unit}"
        digits = 0 if value >= 99.5 else 1 if value >= 9.95 else 2
        return f"{value:.{digits}f} {unit}"
    return counted(value, unit) if unit or value >= _NEXT else f"{value:.3g}"


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
