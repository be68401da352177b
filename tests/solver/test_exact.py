from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxmpq.solver.exact import allowance, common_denominator, exact, plain, within

finite = st.floats(allow_nan=False, allow_infinity=False)


@given(number=finite)
def test_a_float_is_the_decimal_it_prints_as(number: float) -> None:
    assert float(exact(number)) == number
    assert exact(number) == Fraction(repr(number))


@given(number=st.integers())
def test_integers_of_any_size_are_themselves(number: int) -> None:
    assert exact(number) == plain(exact(number)) == number


@given(numbers=st.lists(finite, min_size=1, max_size=5))
def test_the_common_denominator_makes_integers(numbers: list[float]) -> None:
    factor = common_denominator(exact(number) for number in numbers)
    assert all((exact(number) * factor).denominator == 1 for number in numbers)


@given(percent=st.integers(1, 99), total=st.integers(1, 10**9))
def test_a_share_that_is_an_integer_can_be_used_up(percent: int, total: int) -> None:
    assert within(percent * total, percent / 100 * (100 * total))
    assert not within(percent * total + 1, percent / 100 * (100 * total))


@pytest.mark.parametrize("limit", [10**18, 10.0**15, Fraction(7)])
def test_between_integers_nothing_is_rounded(limit: float | Fraction) -> None:
    assert allowance(limit) == limit
    assert not within(int(limit) + 1, limit)
