from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Union

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxmpq.errors import FileFormatError
from fxmpq.formats import NumberFormat, Precision, Scheme
from fxmpq.granularity import PerBlock, PerTensor
from fxmpq.graph.state import Group, Layer, LeftFloat, Refinement
from fxmpq.quantizers.ranges import ActivationRange
from fxmpq.storage.fields import decode, decode_fields, encode, encode_fields, format_named

NAMES = st.text(min_size=1, max_size=8)
COUNTS = st.integers(0, 2**40)
PRECISIONS = st.sampled_from(
    ["fp32", "w2", "w4a8", "w8a8", "w16a16", "w4b32", "w4ta8", "we4m3ae4m3", "we2m1b32a8d"]
).map(Precision.parse)
LAYERS = st.builds(
    Layer,
    name=NAMES,
    kind=NAMES,
    node=NAMES,
    weight=NAMES,
    macs=COUNTS,
    weight_shape=st.lists(COUNTS, max_size=4).map(tuple),
    channel_axis=st.integers(0, 3),
    weight_quantizer=st.none() | NAMES,
    bias_correction=st.none() | NAMES,
    input_quantizer=st.none() | NAMES,
)
GROUPS = st.builds(
    Group,
    name=NAMES,
    layers=st.lists(LAYERS, max_size=3).map(tuple),
    candidates=st.lists(PRECISIONS, max_size=4).map(tuple),
    activation_quantizers=st.lists(NAMES, max_size=3).map(tuple),
)
NUMBERS = st.floats(allow_nan=False)


class Colour(Enum):
    RED = "red"


@dataclass(frozen=True)
class Later:
    """A dataclass as another release may have it."""

    colour: Colour
    pairs: tuple[tuple[str, float], ...]
    either: int | str | None
    named: Mapping[str, tuple[int, str]]
    listed: list[bool]
    old_style: Union[int, None] = None  # noqa: UP007  (both ways of writing it)


def through_text(value: object, kind: object) -> object:
    return decode(kind, json.loads(json.dumps(encode(value), allow_nan=False)), "it")


@given(GROUPS)
def test_groups_come_back(group: Group) -> None:
    assert through_text(group, Group) == group


@given(
    st.builds(Refinement, method=NAMES, layer=NAMES, before=NUMBERS, after=NUMBERS),
    st.builds(LeftFloat, name=NAMES, reason=NAMES, macs=COUNTS),
    st.builds(ActivationRange, scale=NUMBERS, zero_point=st.integers(-(2**16), 2**16)),
)
def test_other_dataclasses_come_back(
    refinement: Refinement, left: LeftFloat, found: ActivationRange
) -> None:
    assert through_text(refinement, Refinement) == refinement
    assert through_text(left, LeftFloat) == left
    assert through_text(found, ActivationRange) == found


def test_a_dataclass_with_other_annotations_comes_back() -> None:
    for either in (3, "three", None):
        later = Later(Colour.RED, (("k", 3.5),), either, {"a": (1, "x")}, [True, False], 4)
        assert through_text(later, Later) == later


@pytest.mark.parametrize("scheme", [Scheme.SYMMETRIC, Scheme.AFFINE])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8, 16])
def test_integer_formats_are_found_by_name(scheme: Scheme, bits: int) -> None:
    found = NumberFormat(bits, scheme)
    assert format_named(found.name) == found


@pytest.mark.parametrize("scheme", [Scheme.E4M3, Scheme.E5M2, Scheme.E2M1])
def test_other_formats_are_found_by_name(scheme: Scheme) -> None:
    bits = 4 if scheme is Scheme.E2M1 else 8
    formats = [
        NumberFormat(bits, scheme),
        NumberFormat(bits, scheme, PerTensor()),
        NumberFormat(bits, scheme, PerBlock(32)),
        NumberFormat(4, Scheme.SYMMETRIC, PerTensor()),
        NumberFormat(4, Scheme.SYMMETRIC, PerBlock(128)),
    ]
    assert [format_named(found.name) for found in formats] == formats
    assert encode(formats) == [found.name for found in formats]


@pytest.mark.parametrize("name", ["", "int", "int9", "uint4b32", "float8", "fp8_e2m1", "int4b1"])
def test_there_are_no_such_formats(name: str) -> None:
    with pytest.raises(FileFormatError):
        decode(NumberFormat, name, "it")


def test_fields_with_defaults_may_be_missing() -> None:
    found = encode_fields(LeftFloat("a", "because", 7), leave=("macs",))
    assert decode_fields(LeftFloat, found, "it") == LeftFloat("a", "because")
    whole = decode_fields(LeftFloat, found, "it", others={"macs": 7})
    assert whole == LeftFloat("a", "because", 7)


LAYER = encode(LeftFloat("a", "b"))
assert isinstance(LAYER, dict)


@pytest.mark.parametrize(
    ("kind", "found", "message"),
    [
        (LeftFloat, {**LAYER, "extra": 1}, r"it has no \['extra'\]"),
        (LeftFloat, {"name": "a"}, "reason"),
        (LeftFloat, {**LAYER, "macs": "7"}, "it.macs must be int; found '7'"),
        (LeftFloat, {**LAYER, "macs": True}, "it.macs must be int"),
        (LeftFloat, {**LAYER, "macs": 7.0}, "it.macs must be int"),
        (LeftFloat, [], "it must be an object"),
        (LeftFloat, {**LAYER, "name": None}, "it.name must be str"),
        (tuple[int, ...], "12", "it must be tuple"),
        (tuple[int, str], [1], "it must be 2 values; found 1"),
        (dict[str, int], [1], "it must be dict"),
        (int | None, "x", "it must be int; found 'x'"),
        (Precision, "w9", "w9|9-bit"),
        (Precision, 4, "cannot read the precision"),
        (Colour, "blue", "blue"),
        (float, "1.0", "it must be float"),
        (object, 1, "it must be object"),
    ],
)
def test_what_does_not_fit_is_refused(kind: object, found: object, message: str) -> None:
    with pytest.raises(FileFormatError, match=message):
        decode(kind, found, "it")


def test_floats_that_are_whole_or_infinite_come_back() -> None:
    refinement = Refinement("m", "l", 1.0, float("inf"))
    assert through_text(refinement, Refinement) == refinement
    assert decode(float, 1, "it") == 1.0


def test_other_objects_are_not_stored() -> None:
    values: list[Any] = [object(), {1, 2}, LeftFloat]
    for value in values:
        with pytest.raises(FileFormatError, match="cannot be stored"):
            encode(value)
