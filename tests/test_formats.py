from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxmpq.errors import PrecisionError
from fxmpq.formats import NumberFormat, Precision, ScaleKind, Scheme
from fxmpq.granularity import Dynamic, Granularity, PerBlock, PerChannel, PerTensor

WIDTHS = [2, 3, 4, 5, 6, 7, 8, 16]
FLOATS = {Scheme.E4M3: 8, Scheme.E5M2: 8, Scheme.E2M1: 4}
widths = st.sampled_from(WIDTHS)
granularities = st.sampled_from([PerTensor(), PerChannel()]) | st.builds(
    PerBlock, st.integers(2, 4096)
)
floats = st.sampled_from(Scheme).filter(FLOATS.__contains__)


def float_format(scheme: Scheme, granularity: Granularity = PerChannel()) -> NumberFormat:
    return NumberFormat(FLOATS[scheme], scheme, granularity)


weight_formats = st.builds(
    NumberFormat, widths, st.just(Scheme.SYMMETRIC), granularities
) | st.builds(float_format, floats, granularities)
activation_formats = st.builds(
    NumberFormat, widths, st.just(Scheme.AFFINE), dynamic=st.sampled_from([None, *Dynamic])
) | st.builds(float_format, floats, st.just(PerTensor()))
formats = weight_formats | activation_formats
precisions = st.one_of(
    st.just(Precision()), st.builds(Precision, weight_formats, st.none() | activation_formats)
)
plain = st.builds(Precision, widths, st.none() | widths)


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
        (NumberFormat(4, Scheme.SYMMETRIC, PerBlock(32)), "int4b32", -8, 7),
        (NumberFormat(4, Scheme.SYMMETRIC, PerTensor()), "int4t", -8, 7),
        (NumberFormat(8, Scheme.E4M3), "fp8_e4m3", 0, 255),
        (NumberFormat(8, Scheme.E5M2, PerTensor()), "fp8_e5m2t", 0, 255),
        (NumberFormat(4, Scheme.E2M1, PerBlock(16)), "fp4_e2m1b16", 0, 15),
    ],
)
def test_formats_people_know(number_format: NumberFormat, name: str, low: int, high: int) -> None:
    assert (number_format.name, number_format.qmin, number_format.qmax) == (name, low, high)


@given(formats, formats)
def test_names_tell_formats_apart_and_are_legal_attributes(
    one: NumberFormat, other: NumberFormat
) -> None:
    assert (one.name == other.name) == (one == other)
    assert f"scale_{one.name}".isidentifier()


@given(formats)
def test_integers_are_told_from_floats(number_format: NumberFormat) -> None:
    assert number_format.is_integer == (number_format.scheme not in FLOATS)
    is_fixed = number_format.is_integer and number_format.dynamic is None
    assert number_format.has_fixed_grid == is_fixed


@pytest.mark.parametrize(
    ("name", "dynamic", "stored"),
    [
        ("w8a8d", Dynamic.TENSOR, "uint8d"),
        ("w4a8dt", Dynamic.ROW, "uint8dt"),
        ("w4b32a4d", Dynamic.TENSOR, "uint4d"),
        ("a16dt", Dynamic.ROW, "uint16dt"),
        ("w8a8", None, "uint8"),
    ],
)
def test_ranges_found_at_run_time_are_read_from_names(
    name: str, dynamic: Dynamic | None, stored: str
) -> None:
    found = Precision.parse(name)
    assert str(found) == name
    assert found.activation is not None
    assert (found.activation.dynamic, found.activation.name) == (dynamic, stored)


@pytest.mark.parametrize("name", ["w8d", "w8da8", "w8a8t", "w8a8dd", "w8ad"])
def test_only_activations_have_ranges_found_at_run_time(name: str) -> None:
    with pytest.raises(PrecisionError, match="behind an integer activation as in 'w8a8d'"):
        Precision.parse(name)


@pytest.mark.parametrize("name", ["we4m3ae4m3d", "w8ae2m1dt"])
def test_floats_have_no_ranges_found_at_run_time(name: str) -> None:
    with pytest.raises(PrecisionError, match="only integer activations find a range at run time"):
        Precision.parse(name)
    with pytest.raises(PrecisionError, match="not symmetric codes"):
        NumberFormat(8, dynamic=Dynamic.ROW)


def test_a_range_found_at_run_time_comes_behind_the_same_width() -> None:
    names = ["w8", "w8a8dt", "w8a8", "w4a8d", "w8a8d", "w8a4d"]
    ordered = sorted(map(Precision.parse, names), key=lambda found: found.sort_key)
    wanted = ["w4a8d", "w8a4d", "w8a8", "w8a8d", "w8a8dt", "w8"]
    assert [str(found) for found in ordered] == wanted


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("w4b32", ScaleKind.FLOAT32),
        ("w4b16", ScaleKind.FLOAT32),
        ("we2m1", ScaleKind.FLOAT32),
        ("we2m1b64", ScaleKind.FLOAT32),
        ("we2m1b32", ScaleKind.E8M0),
        ("we4m3b32", ScaleKind.E8M0),
        ("we5m2b32", ScaleKind.E8M0),
        ("we2m1b16", ScaleKind.E4M3),
        ("we4m3b16", ScaleKind.FLOAT32),
    ],
)
def test_scales_are_stored_as_hardware_has_them(name: str, kind: ScaleKind) -> None:
    weight = Precision.parse(name).weight
    assert weight is not None
    assert weight.scale_kind is kind


@given(st.integers(-4, 64).filter(lambda bits: bits not in WIDTHS))
def test_another_width_is_refused_with_the_legal_ones(bits: int) -> None:
    with pytest.raises(PrecisionError, match=f"no {bits}-bit .* 2, 3, 4, 5, 6, 7, 8, 16"):
        NumberFormat(bits)
    with pytest.raises(PrecisionError, match=f"no {bits}-bit"):
        Precision(bits)
    with pytest.raises(PrecisionError, match=f"no {bits}-bit"):
        Precision(8, bits)


def test_a_float_has_its_own_width() -> None:
    with pytest.raises(PrecisionError, match="e2m1 codes are 4 bits wide, not 8"):
        NumberFormat(8, Scheme.E2M1)


def test_affine_codes_are_per_tensor() -> None:
    assert NumberFormat(8, Scheme.AFFINE) == NumberFormat(8, Scheme.AFFINE, PerTensor())
    with pytest.raises(PrecisionError, match="affine codes have one scale per tensor.*32"):
        NumberFormat(8, Scheme.AFFINE, PerBlock(32))


@given(precisions)
def test_names_round_trip(precision: Precision) -> None:
    assert Precision.parse(str(precision)) == precision
    assert Precision.parse(f"  {str(precision).upper()}\n") == precision
    assert Precision.parse(precision) is precision
    assert repr(precision) == f"Precision.parse('{precision}')"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("w4a8", Precision(4, 8)),
        ("w16a16", Precision(16, 16)),
        ("w3", Precision(3)),
        ("fp32", Precision()),
        ("w4b32a8", Precision(NumberFormat(4, granularity=PerBlock(32)), 8)),
        ("w4b128", Precision(NumberFormat(4, granularity=PerBlock(128)))),
        ("w4ta8", Precision(NumberFormat(4, granularity=PerTensor()), 8)),
        (
            "we4m3ae4m3",
            Precision(float_format(Scheme.E4M3), float_format(Scheme.E4M3, PerTensor())),
        ),
        ("we2m1b16a8", Precision(float_format(Scheme.E2M1, PerBlock(16)), 8)),
        ("w8ae5m2", Precision(8, float_format(Scheme.E5M2, PerTensor()))),
        ("a8", Precision(None, 8)),
        ("ae4m3", Precision(activation=float_format(Scheme.E4M3, PerTensor()))),
    ],
)
def test_parse(name: str, expected: Precision) -> None:
    assert Precision.parse(name) == expected
    assert str(expected) == name


@pytest.mark.parametrize(
    "name",
    [
        *["", "8", "int8", "a", "w4a", "wa8", "w4 a8", "w-4", "w4a8a8", "fp16"],
        *["w4b", "w4b32t", "w4tb32", "w4a8b32", "we3m4", "we4m3ae4m", "a4b32", "wfp8"],
    ],
)
def test_an_unreadable_name_is_refused_with_examples(name: str) -> None:
    with pytest.raises(PrecisionError, match=r"'w4a8'.*'w4'.*'w4b32a8'.*'fp32'") as caught:
        Precision.parse(name)
    assert repr(name) in str(caught.value)


def test_a_block_of_one_is_refused() -> None:
    with pytest.raises(PrecisionError, match="a block of 1 values cannot share a scale"):
        Precision.parse("w4b1a8")


@given(precisions)
def test_halves_make_up_a_precision(precision: Precision) -> None:
    weights, activations = precision.weight_only, precision.activation_only
    assert Precision(weights.weight, activations.activation) == precision
    assert (weights.activation, activations.weight) == (None, None)
    assert precision.is_float == (weights.is_float and activations.is_float)
    assert activations.is_float == (precision.activation_bits is None)


def test_activations_alone_are_between_quantized_weights_and_float() -> None:
    names = ["w8a8", "w8", "a4", "a8", "fp32"]
    assert sorted({*names}, key=lambda name: Precision.parse(name).sort_key) == names


def test_formats_must_suit_their_place() -> None:
    with pytest.raises(PrecisionError, match="weights are symmetric or floats, not uint8"):
        Precision(NumberFormat(8, Scheme.AFFINE))
    for activation in (NumberFormat(8), float_format(Scheme.E4M3)):
        with pytest.raises(PrecisionError, match=f"one scale per tensor, not {activation.name}"):
            Precision(8, activation)


@given(plain)
def test_widths_stand_for_integer_formats(precision: Precision) -> None:
    weight, activation = precision.weight, precision.activation
    assert weight is not None
    assert (weight.bits, weight.scheme) == (precision.weight_bits, Scheme.SYMMETRIC)
    assert weight.granularity == PerChannel()
    assert (activation is None) == (precision.activation_bits is None)
    if activation is not None:
        assert (activation.bits, activation.scheme) == (precision.activation_bits, Scheme.AFFINE)
        assert activation.granularity == PerTensor()
    assert precision.weight_only == Precision(precision.weight_bits)


@given(precisions)
def test_parts_agree_with_the_whole(precision: Precision) -> None:
    assert precision.is_float == (precision.weight is None) == (precision.weight_bits is None)
    assert precision.weight_only.weight == precision.weight
    assert precision.weight_only.activation is None
    assert precision.weight_only.sort_key >= precision.sort_key


def test_sorting_goes_from_few_bits_to_many_and_few_scales_to_many() -> None:
    expected = [
        *["w2a8", "w4ta8", "w4a8", "we2m1a8", "w4b128a8", "w4b32a8", "we2m1b16a8", "w4a16"],
        *["w4b64", "w8a8", "we4m3ae4m3", "w8", "fp32"],
    ]
    for names in (expected, expected[::-1], sorted(expected)):
        by_bits = sorted(map(Precision.parse, names), key=lambda precision: precision.sort_key)
        assert [str(precision) for precision in by_bits] == expected


@given(precisions)
def test_values_are_frozen_and_hashable(precision: Precision) -> None:
    assert len({precision, Precision.parse(str(precision))}) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        precision.weight = None  # type: ignore[misc]
