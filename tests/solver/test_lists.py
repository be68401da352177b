from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxmpq.solver import lists
from fxmpq.solver.instance import Instance, Option, reduce_instance
from fxmpq.solver.lists import best_by_lists
from fxmpq.solver.relaxation import Relaxation

spreads = st.sampled_from([st.integers(0, 3), st.integers(0, 9), st.integers(0, 10**30)])


@st.composite
def instances(draw: st.DrawFn) -> Instance | None:
    rows = draw(st.integers(1, 3))
    keys = itertools.count()
    entry = draw(spreads)
    groups = tuple(
        tuple(
            Option(next(keys), draw(entry), tuple(draw(entry) for _ in range(rows)))
            for _ in range(draw(st.integers(2, 4)))
        )
        for _ in range(draw(st.integers(1, 5)))
    )
    limits = tuple(
        sum(max(o.costs[row] for o in group) for group in groups) * draw(st.integers(10, 90)) // 100
        for row in range(rows)
    )
    return reduce_instance(Instance(groups, limits))


@settings(max_examples=200, deadline=None)
@given(
    instance=instances(),
    seed=st.integers(0, 9) | st.none(),
    share=st.floats(0.01, 1.5),
)
def test_the_best_choice_is_that_of_enumeration(
    instance: Instance | None, seed: int | None, share: float
) -> None:
    """At any prices, good or bad, and for any greatest value of interest."""
    if instance is None or not instance.limits:
        return
    values = [
        sum(option.value for option in found)
        for found in itertools.product(*instance.groups)
        if instance.is_met_by(found)
    ]
    worst = max(sum(max(o.value for o in group) for group in instance.groups), 1)
    relaxation = Relaxation.of(instance, worst)
    prices = relaxation.single_price()
    if seed is not None:
        prices = np.random.default_rng(seed).uniform(0, 2, len(prices))
    most = int(share * (min(values) if values and min(values) else worst))
    listed = best_by_lists(instance, relaxation, prices, unit=worst, most=most)
    assert listed.complete
    fitting = [value for value in values if value <= most]
    if not fitting:
        assert listed.chosen is None
        return
    assert listed.chosen is not None
    assert sum(option.value for option in listed.chosen) == min(fitting)
    assert instance.is_met_by(listed.chosen)
    assert all(o in group for o, group in zip(listed.chosen, instance.groups, strict=True))


def correlated(groups: int) -> Instance:
    """Losses equal to sizes: every choice that fills the limit is as good as the bound."""
    generator = np.random.default_rng(3)
    sizes = [2 * int(size) for size in generator.integers(10**11, 10**12, groups)]
    options = tuple(
        (Option(2 * index, 0, (size,)), Option(2 * index + 1, size, (0,)))
        for index, size in enumerate(sizes)
    )
    return Instance(options, (sum(sizes) // 4 * 2 - 1,))


def test_lists_that_grow_too_long_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    instance = correlated(40)
    worst = sum(group[1].value for group in instance.groups)
    relaxation = Relaxation.of(instance, worst)
    prices = relaxation.single_price()
    monkeypatch.setattr(lists, "_MOST", 2_000)
    listed = best_by_lists(instance, relaxation, prices, unit=worst, most=worst // 2)
    assert not listed.complete
    small = correlated(8)
    worst = sum(group[1].value for group in small.groups)
    relaxation = Relaxation.of(small, worst)
    listed = best_by_lists(small, relaxation, relaxation.single_price(), unit=worst, most=worst)
    assert listed.complete
    assert listed.chosen is not None
