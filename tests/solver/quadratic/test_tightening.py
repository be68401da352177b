from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxmpq.solver.quadratic.descent import value
from fxmpq.solver.quadratic.planes import Choices
from fxmpq.solver.quadratic.tightening import Tightened, tightened


def program(seed: int, groups: int = 4, size: int = 3) -> tuple[np.ndarray, Choices]:
    generator = np.random.default_rng(seed)
    options = groups * size
    factor = generator.normal(size=(options, options))
    costs = generator.uniform(0, 2 / groups, (1, options))
    costs[:, ::size] = 0
    return factor.T @ factor, Choices((size,) * groups, costs)


def within(choices: Choices) -> list[np.ndarray]:
    ranges = [
        range(start, start + size)
        for start, size in zip(choices.starts.tolist(), choices.sizes, strict=True)
    ]
    found = map(np.array, itertools.product(*ranges))
    return [chosen for chosen in found if choices.costs[:, chosen].sum() <= 1]


def run(matrix: np.ndarray, choices: Choices, ceiling: float, **options: float) -> Tightened:
    given_options = {"enough": ceiling, "deadline": np.inf, **options}
    return tightened(matrix, choices, ceiling=ceiling, **given_options)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_every_choice_below_the_ceiling_stays_and_its_value_with_it(seed: int) -> None:
    matrix, choices = program(seed)
    values = sorted(value(matrix, chosen) for chosen in within(choices))
    ceiling = values[min(3, len(values) - 1)]
    found = run(matrix, choices, ceiling)
    assert found.bound <= values[0] + 1e-9 or found.bound == ceiling == values[0]
    for chosen in within(choices):
        reached = value(matrix, chosen)
        if reached < ceiling - 1e-9:
            assert np.isin(chosen, found.kept).all()
            point = np.isin(found.kept, chosen).astype(float)
            function = found.function
            here = point @ function.matrix @ point + function.linear @ point + function.constant
            assert here == pytest.approx(reached, rel=1e-8)


def test_it_rules_options_out_and_lifts_the_bound() -> None:
    matrix, choices = program(2, groups=6, size=4)
    least = min(value(matrix, chosen) for chosen in within(choices))
    found = run(matrix, choices, 1.001 * least)
    first = run(matrix, choices, 1.001 * least, deadline=time.monotonic())
    assert first.planes == 1
    assert found.planes > 1
    assert first.bound < found.bound <= least
    assert found.choices is not None
    assert len(found.kept) == len(found.point) == sum(found.choices.sizes) < len(matrix)


def test_nothing_is_left_below_a_ceiling_that_is_too_low() -> None:
    matrix, choices = program(3)
    least = min(value(matrix, chosen) for chosen in within(choices))
    found = run(matrix, choices, 0.01 * least, enough=np.inf)
    assert (found.choices, len(found.kept)) == (None, 0)
    assert found.bound == 0.01 * least


def test_it_stops_when_the_bound_is_enough() -> None:
    matrix, choices = program(4, groups=6)
    least = min(value(matrix, chosen) for chosen in within(choices))
    assert run(matrix, choices, least, enough=0.0).planes == 1
