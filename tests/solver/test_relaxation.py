from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxmpq.solver.instance import Instance, Option, reduce_instance
from fxmpq.solver.relaxation import (
    Relaxation,
    improved,
    prices_per_cost,
    prices_per_limit,
)


@st.composite
def reduced_instances(draw: st.DrawFn) -> Instance | None:
    rows = draw(st.integers(1, 3))
    keys = itertools.count()
    groups = tuple(
        tuple(
            Option(
                next(keys),
                draw(st.integers(0, 9)),
                tuple(draw(st.integers(0, 9)) for _ in range(rows)),
            )
            for _ in range(draw(st.integers(2, 4)))
        )
        for _ in range(draw(st.integers(2, 4)))
    )
    return reduce_instance(Instance(groups, tuple(draw(st.integers(4, 20)) for _ in range(rows))))


def choices(instance: Instance) -> list[tuple[Option, ...]]:
    return [found for found in itertools.product(*instance.groups) if instance.is_met_by(found)]


@given(instance=reduced_instances(), seed=st.integers(0, 99))
def test_any_prices_bound_every_choice(instance: Instance | None, seed: int) -> None:
    if instance is None or not instance.limits:
        return
    relaxation = Relaxation.of(instance, 3)
    prices = np.random.default_rng(seed).uniform(0, 5, len(instance.limits))
    bound, reduced = relaxation.bound(prices)
    place = {option.key: index for index, option in enumerate(instance.options)}
    for found in choices(instance):
        objective = sum(option.value for option in found) / 3
        for option in found:
            assert bound + reduced[place[option.key]] <= objective + 1e-9


@given(instance=reduced_instances())
def test_a_repaired_choice_fits_and_improving_keeps_it_so(instance: Instance | None) -> None:
    if instance is None or not instance.limits:
        return
    relaxation = Relaxation.of(instance, 1)
    indices = relaxation.repaired(relaxation.single_price())
    if indices is None:
        assert len(instance.limits) > 1
        return
    options = instance.options
    chosen = [options[index] for index in indices]
    assert instance.is_met_by(chosen)
    better = improved(instance, chosen)
    assert instance.is_met_by(better)
    value = sum(option.value for option in better)
    assert value <= sum(option.value for option in chosen)
    for index, group in enumerate(instance.groups):
        for option in group:
            exchanged = [*better[:index], option, *better[index + 1 :]]
            assert option.value >= better[index].value or not instance.is_met_by(exchanged)


def test_one_limit_gets_the_price_of_the_linear_relaxation() -> None:
    groups = tuple(
        (Option(2 * index, 0, (2,)), Option(2 * index + 1, loss, (0,)))
        for index, loss in enumerate((1, 2, 3, 4))
    )
    relaxation = Relaxation.of(Instance(groups, (5,)), 1)
    # Two and a half groups fit: the marginal one gains 2 for 2/5 of the limit.
    assert relaxation.single_price() == pytest.approx([5.0])
    assert relaxation.bound(relaxation.single_price())[0] == pytest.approx(1 + 2 * 0.5)


@given(instance=reduced_instances(), seed=st.integers(0, 99), unit=st.integers(1, 10**40))
def test_prices_by_cost_are_those_by_limit(instance: Instance | None, seed: int, unit: int) -> None:
    if instance is None:
        return
    prices = np.random.default_rng(seed).uniform(0, 5, len(instance.limits))
    by_cost = prices_per_cost(instance, prices, unit)
    assert list(by_cost) == [row for row, _ in instance.rows]
    for (_, divisor), limit, price, found in zip(
        instance.rows, instance.limits, prices, by_cost.values(), strict=True
    ):
        assert float(found * limit * divisor / unit) == price
    assert prices_per_limit(instance, by_cost, unit).tolist() == prices.tolist()
    assert not prices_per_limit(instance, {}, unit).any()


@given(instance=reduced_instances(), near=st.floats(0, 1e6))
def test_a_price_to_look_at_first_changes_nothing(instance: Instance | None, near: float) -> None:
    if instance is None or not instance.limits:
        return
    relaxation = Relaxation.of(instance, 3)
    price = relaxation.single_price()
    assert relaxation.single_price(near) == pytest.approx(price, rel=1e-8, abs=1e-12)
    again = relaxation.single_price(float(price[0]))
    assert again == pytest.approx(price, rel=1e-8, abs=1e-12)
    assert relaxation.bound(again)[0] == pytest.approx(relaxation.bound(price)[0], abs=1e-6)
