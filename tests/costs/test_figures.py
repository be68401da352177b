from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxmpq.costs.figures import KindFigures, MetricFigures
from fxmpq.costs.weights import weight_bytes
from fxmpq.errors import FxmpqError
from fxmpq.formats import Precision
from fxmpq.graph.state import Group, Layer, Product

W8A8 = Precision(8, 8)


def layer(name: str, kind: str = "conv", macs: int = 100, weight: str | None = None) -> Layer:
    return Layer(name, kind, name, weight or f"{name}.weight", macs, (4, 2, 3, 3), 0)


def group(*layers: Layer, products: tuple[Product, ...] = ()) -> Group:
    return Group("g", layers, (W8A8, Precision()), products=products)


def test_a_group_costs_its_layers_products_and_weights() -> None:
    figures = MetricFigures(
        "cycles",
        KindFigures({"w8a8": 0.5, "fp32": 2}, per_layer=10, per_weight_byte=0.1),
        {"matmul": KindFigures({"a8": 0.25, "fp32": 4}, per_layer=1)},
    )
    found = group(layer("a"), layer("b", macs=40), products=(Product("s", "s", 8),))
    size = weight_bytes(found, W8A8)
    expected = 2 * 10 + 0.5 * 140 + 0.1 * size + 1 + 0.25 * 8
    assert figures.group_cost(found, W8A8) == pytest.approx(expected)
    in_float = 2 * 10 + 2 * 140 + 0.1 * weight_bytes(found, Precision()) + 1 + 4 * 8
    assert figures.group_cost(found, Precision()) == pytest.approx(in_float)


def test_a_tied_weight_is_read_once_and_each_call_multiplies() -> None:
    figures = MetricFigures("cycles", KindFigures({"w8a8": 1}, per_weight_byte=1))
    tied = group(layer("a", weight="w"), layer("b", weight="w"))
    assert figures.group_cost(tied, W8A8) == 200 + weight_bytes(group(layer("a")), W8A8)


def test_a_tied_weight_is_read_by_the_layer_that_pays_for_it() -> None:
    figures = MetricFigures(
        "c", KindFigures({"w8": 0}, per_weight_byte=2), {"embedding": KindFigures()}
    )
    look_up, head = layer("a", "embedding", macs=0, weight="w"), layer("b", "linear", weight="w")
    once = 2 * weight_bytes(group(head), Precision(8))
    assert figures.group_cost(group(look_up), Precision(8)) == 0
    for layers in ((look_up, head), (head, look_up), (look_up, head, look_up)):
        assert figures.group_cost(group(*layers), Precision(8)) == once


def test_a_look_up_needs_no_figure_for_products() -> None:
    figures = MetricFigures("cycles", KindFigures(per_layer=7))
    assert figures.group_cost(group(layer("a", "embedding", macs=0)), Precision(8)) == 7


@given(st.integers(0, 10**9), st.floats(0, 1e6), st.floats(0, 1e3))
def test_what_stays_float_is_a_line(macs: int, per_model: float, per_mac: float) -> None:
    figures = MetricFigures("c", KindFigures({"fp32": per_mac}), per_model=per_model)
    assert figures.knows_float
    assert figures.float_cost(macs) == pytest.approx(per_model + macs * per_mac)


def test_figures_that_are_missing_are_named() -> None:
    figures = MetricFigures("cycles", KindFigures({"w8a8": 1}))
    assert not figures.knows_float
    assert figures.float_cost(0) == 0
    with pytest.raises(FxmpqError, match=r"12 multiply-accumulates .* stay in float, .*fp32"):
        figures.float_cost(12)
    with pytest.raises(FxmpqError, match=r"'a' \(conv\) may run at w4a8, .*there are 'w8a8'"):
        figures.group_cost(group(layer("a")), Precision(4, 8))


@pytest.mark.parametrize("value", [-1.0, math.inf, math.nan])
def test_costs_are_finite_and_not_negative(value: float) -> None:
    for wrong in ({"per_mac": {"w8a8": value}}, {"per_layer": value}, {"per_weight_byte": value}):
        with pytest.raises(FxmpqError, match="is finite and not negative"):
            KindFigures(**wrong)
    with pytest.raises(FxmpqError, match="per_model is"):
        MetricFigures("c", KindFigures(), per_model=value)
