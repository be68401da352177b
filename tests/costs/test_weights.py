from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxmpq.costs.weights import weight_bits, weight_bytes
from fxmpq.formats import NumberFormat, Precision
from fxmpq.graph.state import Group, Layer
from fxmpq.quantizers.packing import pack_codes
from fxmpq.quantizers.scales import pack_scale, scale_shape

WIDTHS = st.sampled_from([2, 3, 4, 5, 6, 7, 8, 16])
SHAPES = st.lists(st.integers(1, 7), min_size=1, max_size=4).map(tuple)


def group_of(*weights: tuple[str, tuple[int, ...]], axis: int = 0) -> Group:
    layers = tuple(
        Layer(f"layer{index}", "linear", f"node{index}", name, 0, shape, axis)
        for index, (name, shape) in enumerate(weights)
    )
    return Group("layer0", layers, (Precision(4, 8),))


@given(SHAPES, WIDTHS)
def test_bytes_are_those_of_the_packed_codes_and_the_scales(
    shape: tuple[int, ...], bits: int
) -> None:
    codes = torch.zeros(shape, dtype=torch.int16)
    expected = pack_codes(codes, bits).numel() + 4 * shape[0]
    assert weight_bytes(group_of(("w", shape)), Precision(bits)) == expected


@given(st.lists(SHAPES, min_size=1, max_size=4), WIDTHS)
def test_weights_add_up(shapes: list[tuple[int, ...]], bits: int) -> None:
    precision = Precision(bits, 8)
    together = group_of(*((f"w{index}", shape) for index, shape in enumerate(shapes)))
    alone = [group_of(("w", shape)) for shape in shapes]
    for rule in (weight_bytes, weight_bits):
        assert rule(together, precision) == sum(rule(group, precision) for group in alone)


def test_a_tied_weight_counts_once() -> None:
    tied = group_of(("table", (10, 4)), ("table", (10, 4)))
    assert weight_bytes(tied, Precision(4, 8)) == 20 + 40
    assert weight_bits(tied, Precision(4, 8)) == 160


def test_float_weights_take_four_bytes_and_no_scales() -> None:
    group = group_of(("w", (3, 5)))
    assert weight_bytes(group, Precision()) == 60
    assert weight_bits(group, Precision()) == 15 * 32


def test_scales_follow_the_channel_axis() -> None:
    assert weight_bytes(group_of(("w", (3, 8)), axis=1), Precision(8)) == 24 + 4 * 8


@given(SHAPES, st.sampled_from([None, 2, 8]))
def test_activations_do_not_count(shape: tuple[int, ...], activation: int | None) -> None:
    group = group_of(("w", shape))
    for rule in (weight_bytes, weight_bits):
        assert rule(group, Precision(4, activation)) == rule(group, Precision(4))


@given(SHAPES, st.sampled_from(["w4t", "w4b8", "we4m3", "we2m1b16", "we2m1b32", "we5m2b64"]))
def test_bytes_are_those_of_what_is_stored(shape: tuple[int, ...], name: str) -> None:
    precision = Precision.parse(name)
    assert precision.weight is not None
    codes = torch.zeros(shape, dtype=torch.uint8)
    scale = torch.ones(scale_shape(shape, 0, precision.weight.granularity))
    stored = [
        pack_codes(codes, precision.weight.bits),
        *pack_scale(scale, precision.weight).values(),
    ]
    expected = sum(tensor.numel() * tensor.element_size() for tensor in stored)
    assert weight_bytes(group_of(("w", shape)), precision) == expected


@pytest.mark.parametrize(
    ("name", "scales"),
    [
        ("w4t", 4),
        ("w4", 4 * 6),
        ("w4b128", 4 * 6),
        ("w4b32", 4 * 6 * 3),
        ("we4m3", 4 * 6),
        ("we4m3b32", 6 * 3),
        ("we2m1b16", 6 * 5 + 4),
    ],
)
def test_scales_of_each_granularity(name: str, scales: int) -> None:
    # 6 channels of 72 values: blocks of 32, 32 and 8.
    group, precision = group_of(("w", (6, 8, 3, 3))), Precision.parse(name)
    assert precision.weight_bits is not None
    assert weight_bytes(group, precision) == 6 * 72 * precision.weight_bits // 8 + scales
    assert weight_bits(group, precision) == 6 * 72 * precision.weight_bits


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_numbers_stay_exact_integers_however_large(bits: int) -> None:
    shape = (2**31, 2**31)
    group = group_of(("w", shape))
    assert weight_bits(group, Precision(bits)) == math.prod(shape) * NumberFormat(bits).bits
    assert weight_bytes(group, Precision(bits)) == math.prod(shape) * bits // 8 + 4 * 2**31
