from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import fx

from fxmpq.errors import FileFormatError
from fxmpq.storage.values import DTYPES, Surroundings, decode_value, encode_value

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(),
    st.complex_numbers(),
    st.sampled_from(sorted(DTYPES)).map(DTYPES.__getitem__),
    st.sampled_from([torch.channels_last, torch.preserve_format, torch.contiguous_format]),
    st.sampled_from([torch.strided, torch.sparse_coo]),
    st.sampled_from([torch.device("cpu"), torch.device("meta")]),
    st.just(...),
    st.lists(st.integers(0, 9)).map(torch.Size),
    st.builds(slice, st.none() | st.integers(), st.none() | st.integers(), st.none()),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(st.text() | st.integers(), inner, max_size=3),
    ),
    max_leaves=12,
)


def same(a: object, b: object) -> bool:
    """Equal in type and bits; a NaN equals a NaN, 0.0 is not -0.0, True is not 1."""
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        return (math.isnan(a) and math.isnan(b)) or a.hex() == b.hex()
    if isinstance(a, complex):
        return same(a.real, b.real) and same(a.imag, b.imag)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return same(list(a.items()), list(b.items()))
    return a == b


@given(VALUES)
def test_values_keep_type_and_bits(value: object) -> None:
    text = json.dumps(encode_value(value), allow_nan=False)
    assert same(decode_value(json.loads(text), Surroundings()), value)


def test_the_comparison_of_these_tests_tells_apart() -> None:
    assert not same(0.0, -0.0)
    assert not same(1, 1.0)
    assert not same(True, 1)
    assert not same((1,), [1])
    assert not same(torch.Size([1]), (1,))
    assert same([float("nan")], [float("nan")])


def test_nodes_go_by_name() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    assert encode_value([x, 1]) == [{"node": "x"}, 1]
    assert decode_value([{"node": "x"}, 1], Surroundings({"x": x})) == [x, 1]
    with pytest.raises(FileFormatError, match="the graph has no earlier node 'y'"):
        decode_value({"node": "y"}, Surroundings({"x": x}))


def test_devices_become_the_one_to_load_on_but_meta_stays() -> None:
    around = Surroundings({}, torch.device("cpu"))
    assert encode_value(torch.device("cuda", 1)) == {"device": "cuda:1"}
    assert decode_value({"device": "cuda:1"}, around) == torch.device("cpu")
    assert decode_value({"device": "meta"}, around) == torch.device("meta")


@pytest.mark.parametrize("value", [object(), {1, 2}, b"x", print, int, range(3), torch.ones(1)])
def test_other_values_are_not_stored(value: object) -> None:
    with pytest.raises(FileFormatError, match="cannot be stored in a graph"):
        encode_value(value)


@pytest.mark.parametrize(
    "found",
    [
        {"eval": "1"},
        {},
        {"tuple": [1], "dict": []},
        {"tuple": 3},
        {"dtype": "load"},
        {"dtype": 1},
        {"dtype": ["float32"]},
        {"memory_format": "strided"},
        {"layout": "channels_last"},
        {"float": "1.0"},
        {"float": 2},
        {"complex": [1]},
        {"complex": ["1", 2]},
        {"size": [1.0]},
        {"size": [True]},
        {"slice": [1, 2]},
        {"dict": [[1]]},
        {"dict": [[[1], 2]]},
        {"node": 0},
        {"node": ["x"]},
    ],
)
def test_malformed_values_are_refused(found: object) -> None:
    with pytest.raises(FileFormatError):
        decode_value(found, Surroundings())
