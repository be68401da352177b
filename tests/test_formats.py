from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxmpq.errors import PrecisionError
from fxmpq.formats import NumberFormat, Precision, Scheme

WIDTHS = [2, 3, 4, 5, 6, 7, 8, 16]
widths = st.sampled_from(WIDTHS)
formats = st.builds(NumberFormat, widths, st.sampled_from(Scheme))
precisions = st.one_of(st.just(Precision()), st.builds(Precision, widths, st.none() | widths))


@given(formats)
def test_codes_span_exactly_two_to_the_bits(number_format: NumberFormat) -> None:
    assert number_format.qmax - number_format.qmin + 1 == 2**number_format.bits
    if number_format.scheme is Scheme.SYMMETRIC:
        assert number_format.qmin == -number_format.qmax - 1
    else:
        assert number_format.qmin == 0


@pytest.mark.parametrize(
    ("number_format", "name", "low", "high"),
    [
        (NumberFormat(2), "int2", -2, 1),
        (NumberFormat(4), "int4", -8, 7),
        (NumberFormat(8), "int8", -128, 127),
        (NumberFormat(8, Scheme.AFFINE), "uint8", 0, 255),
        (NumberFormat(16), "int16", -32768, 32767),
        (NumberFormat(16, Scheme.AFFINE), "uint16", 0, 65535),
    ],
)
def test_formats_people_know(number_format: NumberFormat, name: str, low: int, high: int) -> None:
    assert (number_format.name, number_format.qmin, number_format.qmax) == (name, low, high)


@given(st.integers(-4, 64).filter(lambda bits: bits not in WIDTHS))
def test_another_width_is_refused_with_the_legal_ones(bits: int) -> None:
    with pytest.raises(PrecisionError, match=f"no {bits}-bit .* 2, 3, 4, 5, 6, 7, 8, 16"):
        NumberFormat(bits)
    with pytest.raises(PrecisionError, match=f"no {bits}-bit"):
        Precision(bits)
    with pytest.raises(PrecisionError, match=f"no {bits}-bit"):
        Precision(8, bits)


@given(precisions)
def test_names_round_trip(precision: Precision) -> None:
    assert Precision.parse(str(precision)) == precision
    assert Precision.parse(f"  {str(precision).upper()}\n") == precision
    assert Precision.parse(precision) is precision


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("w4a8", Precision(4, 8)),
        ("w16a16", Precision(16, 16)),
        ("w3", Precision(3)),
        ("fp32", Precision()),
    ],
)
def test_parse(name: str, expected: Precision) -> None:
    assert Precision.parse(name) == expected
    assert str(expected) == name


@pytest.mark.parametrize(
    "name", ["", "8", "int8", "a8", "w4a", "wa8", "w4 a8", "w-4", "w4a8a8", "fp16"]
)
def test_an_unreadable_name_is_refused_with_examples(name: str) -> None:
    with pytest.raises(PrecisionError, match=r"'w4a8'.*'w4'.*'fp32'") as caught:
        Precision.parse(name)
    assert repr(name) in str(caught.value)


def test_quantized_activations_need_quantized_weights() -> None:
    with pytest.raises(PrecisionError, match="activations at 8 bits with float weights"):
        Precision(None, 8)


@given(precisions)
def test_parts_agree_with_the_widths(precision: Precision) -> None:
    weight, activation = precision.weight, precision.activation
    assert precision.is_float == (weight is None)
    if weight is not None:
        assert (weight.bits, weight.scheme) == (precision.weight_bits, Scheme.SYMMETRIC)
    assert (activation is None) == (precision.activation_bits is None)
    if activation is not None:
        assert (activation.bits, activation.scheme) == (precision.activation_bits, Scheme.AFFINE)
    assert precision.weight_only == Precision(precision.weight_bits)


def test_sorting_goes_from_few_bits_to_many() -> None:
    names = ["fp32", "w8", "w4a16", "w2a8", "w8a8", "w4a8"]
    by_bits = sorted(map(Precision.parse, names), key=lambda precision: precision.sort_key)
    assert [str(precision) for precision in by_bits] == [
        "w2a8", "w4a8", "w4a16", "w8a8", "w8", "fp32",
    ]  # fmt: skip


@given(precisions)
def test_values_are_frozen_and_hashable(precision: Precision) -> None:
    assert len({precision, Precision.parse(str(precision))}) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        precision.weight_bits = 4  # type: ignore[misc]
