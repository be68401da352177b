from __future__ import annotations

from dataclasses import replace

import pytest

from fxmpq.costs.operations import bops, float_bops, macs
from fxmpq.formats import Precision
from fxmpq.graph.state import Group, Layer, Product


@pytest.fixture
def group() -> Group:
    layers = tuple(
        Layer(f"fc#{index}", "linear", f"n{index}", "fc.weight", count, (2, 3), 0)
        for index, count in enumerate((600, 7))
    )
    return Group("fc", layers, (Precision(4, 8),))


@pytest.mark.parametrize("precision", ["w2a8", "w8a8", "w4", "fp32"])
def test_multiply_accumulates_count_every_call(group: Group, precision: str) -> None:
    assert macs(group, Precision.parse(precision)) == 607


@pytest.mark.parametrize(
    ("precision", "per_mac"),
    [
        *[("w4a8", 32), ("w8a8", 64), ("w2a4", 8), ("w4", 128), ("fp32", 1024)],
        *[("w4b32a8", 32), ("we4m3ae5m2", 64), ("we2m1ae4m3", 32), ("we2m1b16", 128)],
    ],
)
def test_bit_operations_multiply_the_widths(group: Group, precision: str, per_mac: int) -> None:
    assert bops(group, Precision.parse(precision)) == 607 * per_mac


def test_float_operations_count_thirty_two_bits_twice(group: Group) -> None:
    assert float_bops(607) == bops(group, Precision())


@pytest.mark.parametrize(
    ("precision", "per_mac"),
    [("w4a8", 64), ("a4", 16), ("w4", 1024), ("ae4m3", 64), ("fp32", 1024)],
)
def test_both_operands_of_a_product_are_activations(precision: str, per_mac: int) -> None:
    alone = Group("scores", (), (Precision(None, 8),), products=(Product("scores", "s", 30),))
    assert macs(alone, Precision.parse(precision)) == 30
    assert bops(alone, Precision.parse(precision)) == 30 * per_mac


def test_layers_and_products_of_a_group_add_up(group: Group) -> None:
    mixed = replace(group, products=(Product("s", "s", 30), Product("t", "t", 3)))
    assert macs(mixed, Precision(4, 8)) == 607 + 33
    assert bops(mixed, Precision(4, 8)) == 607 * 4 * 8 + 33 * 8 * 8
