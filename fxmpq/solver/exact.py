"""Numbers without rounding, so that a budget that is met exactly counts as met."""

from __future__ import annotations

import math
from collections.abc import Iterable
from fractions import Fraction

Number = int | float | Fraction

_ROUNDING = Fraction(1, 2**50)


def exact(number: Number) -> Fraction:
    """Read a number as the decimal that it prints as: `0.1` is one tenth.

    A latency of 0.1 ms and one of 0.2 ms then fit a budget of 0.3 ms, which neither binary
    floating point nor its exact fractions grant.

    Args:
        number: Finite.

    Returns:
        The same number as a fraction.

    Examples:
        >>> exact(0.1) + exact(0.2) == exact(0.3)
        True
    """
    if isinstance(number, (int, Fraction)):
        return Fraction(number)
    return Fraction(repr(float(number)))


def allowance(limit: Number, *, whole: bool = True) -> Fraction:
    """Return how much a sum may come to under a limit: the limit and its own rounding.

    A limit that is no integer, such as a share of a total, is rounded itself: 29 % of 100 is
    28.999999999999996. Sums may exceed it by `2^-50` of it.

    Args:
        limit: Finite.
        whole: Whether all numbers of the sum are integers; with an integer limit, nothing is
            rounded then.

    Examples:
        >>> allowance(7) == 7, allowance(0.29 * 100) > 29
        (True, True)
    """
    number = exact(limit)
    if whole and number.denominator == 1:
        return number
    return number + abs(number) * _ROUNDING


def within(total: Number, limit: Number) -> bool:
    """Whether a total keeps a limit, given the limit's own rounding.

    Examples:
        >>> within(29, 0.29 * 100), within(30, 29)
        (True, False)
    """
    return exact(total) <= allowance(limit, whole=isinstance(total, int))


def plain(number: Fraction) -> int | float:
    """Return an integer where the number is one, and the nearest float where not.

    Examples:
        >>> plain(Fraction(6, 2)), plain(Fraction(1, 4))
        (3, 0.25)
    """
    return number.numerator if number.denominator == 1 else float(number)


def common_denominator(numbers: Iterable[Fraction]) -> int:
    """Return the least integer whose product with every number is an integer.

    Examples:
        >>> common_denominator([Fraction(1, 4), Fraction(5, 6)])
        12
    """
    return math.lcm(*{number.denominator for number in numbers})
