from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxmpq.costs.table import CostTable
from fxmpq.report.tradeoff import trade_off
from fxmpq.sensitivity.sensitivity import Sensitivity

BITS = {"w2a8": 2, "w4a8": 4, "w8a8": 8}


@given(st.lists(st.tuples(st.integers(1, 50), st.floats(1e-4, 1.0)), min_size=1, max_size=4))
def test_every_point_is_the_best_plan_of_its_size(groups: list[tuple[int, float]]) -> None:
    sizes = {
        f"g{i}": {name: bits * size for name, bits in BITS.items()}
        for i, (size, _) in enumerate(groups)
    }
    losses = {
        f"g{i}": {name: loss * 4.0**-bits for name, bits in BITS.items()}
        for i, (_, loss) in enumerate(groups)
    }
    curve = trade_off(Sensitivity(losses), CostTable({"weights": sizes}), points=5)
    assert curve[0].weight_bytes == sum(row["w2a8"] for row in sizes.values())
    assert curve[-1].weight_bytes == sum(row["w8a8"] for row in sizes.values())
    every = [
        (
            sum(sizes[f"g{i}"][name] for i, name in enumerate(names)),
            sum(losses[f"g{i}"][name] for i, name in enumerate(names)),
        )
        for names in itertools.product(BITS, repeat=len(groups))
    ]
    for point in curve:
        best = min(loss for size, loss in every if size <= point.weight_bytes)
        assert point.sqnr_db == pytest.approx(-10 * math.log10(best))
    decibels = [point.sqnr_db for point in curve]
    assert decibels == sorted(decibels)


def test_one_candidate_is_one_point_and_no_loss_is_none() -> None:
    costs = CostTable({"weights": {"a": {"w8a8": 7}}})
    (point,) = trade_off(Sensitivity({"a": {"w8a8": 0.01}}), costs)
    assert (point.weight_bytes, point.sqnr_db) == (7, pytest.approx(20.0))
    assert trade_off(Sensitivity({"a": {"w8a8": 0.0}}), costs) == ()


@pytest.mark.parametrize("unit", ["loss", "score"])
def test_what_is_no_noise_power_predicts_no_decibels(unit: str) -> None:
    costs = CostTable({"weights": {"a": {"w8a8": 7}}})
    assert trade_off(Sensitivity({"a": {"w8a8": 0.01}}, unit=unit), costs) == ()
