from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxmpq.solver import exchange
from fxmpq.solver.exchange import exchanged
from fxmpq.solver.instance import Instance, Option

Case = tuple[Instance, list[Option]]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    rows = draw(st.integers(1, 3))
    keys = itertools.count()
    groups = tuple(
        tuple(
            Option(
                next(keys),
                draw(st.integers(-9, 9)),
                tuple(draw(st.integers(-2, 9)) for _ in range(rows)),
            )
            for _ in range(draw(st.integers(1, 3)))
        )
        for _ in range(draw(st.integers(1, 4)))
    )
    instance = Instance(groups, tuple(draw(st.integers(-4, 20)) for _ in range(rows)))
    return instance, [draw(st.sampled_from(group)) for group in groups]


def nearby(case: Case, most: int) -> list[int]:
    """Values of all choices within the limits that differ in at most so many groups."""
    instance, chosen = case
    return [
        sum(option.value for option in found)
        for found in itertools.product(*instance.groups)
        if instance.is_met_by(found)
        and sum(new is not old for new, old in zip(found, chosen, strict=True)) <= most
    ]


@pytest.mark.parametrize("most", [1, 2])
@given(case=cases())
def test_the_best_choice_that_differs_in_so_many_groups(most: int, case: Case) -> None:
    instance, chosen = case
    before = list(chosen)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exchange, "_PAIRED", {1: 0, 2: 1_000}[most])
        found = exchanged(instance, chosen)
    assert chosen == before
    values = nearby(case, most)
    if not values:
        assert found is None
        return
    assert found is not None
    assert instance.is_met_by(found)
    assert sum(option.value for option in found) == min(values)
    assert all(option in group for option, group in zip(found, instance.groups, strict=True))


def test_what_fits_only_after_rounding_is_no_choice() -> None:
    large = 2**60
    groups = ((Option(0, 0, (large + 1,)),),)
    assert exchanged(Instance(groups, (large,)), list(groups[0])) is None
    assert exchanged(Instance(groups, (large + 1,)), list(groups[0])) == list(groups[0])
