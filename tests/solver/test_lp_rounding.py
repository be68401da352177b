from __future__ import annotations

import pytest

from fxmpq.errors import BudgetError
from fxmpq.solver.instance import Instance, Option
from fxmpq.solver.lp_rounding import ROUNDINGS, Relaxed

# Bits 2, 4 and 8 of three groups: each bit less loses more.
GROUPS = tuple(
    tuple(
        Option(3 * group + place, value, (cost,))
        for place, (value, cost) in enumerate([(9 + group, 2), (3, 4), (0, 8)])
    )
    for group in range(3)
)
BITS = dict(enumerate([2, 4, 8] * 3))


def relaxed(limit: int, *shares: float) -> Relaxed:
    return Relaxed(Instance(GROUPS, (limit,)), dict(enumerate(shares)), BITS)


# The first two groups are whole; the third is halfway between 4 and 8 bits.
HALF = (0.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.5, 0.5)


def test_shares_are_read_as_real_bits() -> None:
    found = relaxed(20, *HALF)
    first, second, third = GROUPS
    assert found.whole(first) is first[1]
    assert found.whole(second) is second[2]
    assert found.whole(third) is None
    assert found.real_bits(third) == 6
    assert found.around(third) == [third[1], third[2]]
    # Both are two bits away, at equal shares: then the one of less loss.
    assert found.nearest(third) is third[2]
    assert relaxed(20, *HALF[:7], 0.6, 0.4).nearest(third) is third[1]


def test_nearest_steps_down_to_the_limit_and_fills_what_is_left() -> None:
    chosen = ROUNDINGS["nearest"](relaxed(18, *HALF))
    assert chosen is not None
    assert sum(option.costs[0] for option in chosen) <= 18
    assert sum(option.value for option in chosen) == 6
    roomy = ROUNDINGS["nearest"](relaxed(24, *HALF))
    assert roomy is not None
    assert [option.value for option in roomy] == [0, 0, 0]


def test_the_search_takes_the_best_that_fits_of_those_around() -> None:
    chosen = ROUNDINGS["search"](relaxed(20, *HALF))
    assert chosen == [GROUPS[0][1], GROUPS[1][2], GROUPS[2][2]]
    chosen = ROUNDINGS["search"](relaxed(16, *HALF))
    assert chosen == [GROUPS[0][1], GROUPS[1][2], GROUPS[2][1]]
    # None of those around fits: one steps down.
    chosen = ROUNDINGS["search"](relaxed(12, *HALF))
    assert chosen is not None
    assert sum(option.costs[0] for option in chosen) <= 12


def test_where_nothing_fits_there_is_no_choice() -> None:
    for rounding in ROUNDINGS.values():
        assert rounding(relaxed(5, *HALF)) is None


def test_too_many_combinations_are_refused() -> None:
    groups = tuple((Option(2 * g, 1, (1,)), Option(2 * g + 1, 0, (3,))) for g in range(15))
    keys = range(30)
    bits = {key: 4 + 4 * (key % 2) for key in keys}
    half = Relaxed(Instance(groups, (30,)), dict.fromkeys(keys, 0.5), bits)
    with pytest.raises(BudgetError, match=r"32,768 combinations, since 15 groups lie"):
        ROUNDINGS["search"](half)
    assert ROUNDINGS["nearest"](half) is not None
