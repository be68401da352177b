from __future__ import annotations

import pytest

from fxmpq.errors import PatternError
from fxmpq.graph.findings import Join, Missed
from fxmpq.graph.patterns import matching, read_exclude, read_ties, tied

NAMES = ["layer1.conv", "layer1.fc", "layer2.conv", "layer2.fc", "head"]


def test_patterns_are_fnmatch_and_case_sensitive() -> None:
    assert matching("layer?.conv", NAMES) == ["layer1.conv", "layer2.conv"]
    assert matching("layer[2-9]*", NAMES) == ["layer2.conv", "layer2.fc"]
    assert matching("*", NAMES) == NAMES
    with pytest.raises(PatternError, match="closest of 5 layers: .*'head'"):
        matching("HEAD", NAMES)


def test_exclude_is_a_list_of_patterns() -> None:
    assert read_exclude(["*.fc", "head"]) == ("*.fc", "head")
    assert read_exclude(()) == ()
    for wrong in ("head", 3, None):
        with pytest.raises(PatternError, match=rf"exclude is a list .*; found {wrong!r} alone"):
            read_exclude(wrong)
    with pytest.raises(PatternError, match="exclude holds patterns .*; found 3"):
        read_exclude(["head", 3])


def test_a_tie_is_a_pattern_or_several() -> None:
    assert read_ties(["*.fc", ("head", "*.conv"), ["head"]]) == (
        ("*.fc",),
        ("head", "*.conv"),
        ("head",),
    )
    assert read_ties(()) == ()
    assert read_ties(read_ties(["*"])) == (("*",),)


@pytest.mark.parametrize(
    ("ties", "words"),
    [
        ("*.fc", r"ties is a list of ties, as \['\*.fc'\]"),
        ({"a": "b"}, "ties is a list of ties"),
        ([1], "a tie is a pattern .*; found 1"),
        ([[]], r"a tie is a pattern .*; found \[\]"),
        ([["a", None]], "a tie is a pattern"),
    ],
)
def test_what_is_no_tie_is_refused(ties: object, words: str) -> None:
    with pytest.raises(PatternError, match=words):
        read_ties(ties)  # type: ignore[arg-type]


def test_ties_join_to_the_first_in_graph_order() -> None:
    found = tied([("head", "layer1.*"), ("*.fc",)], NAMES)
    assert found.joins == (
        Join("tied", "layer1.fc", "layer1.conv"),
        Join("tied", "head", "layer1.conv"),
        Join("tied", "layer2.fc", "layer1.fc"),
    )
    assert found.missed == ()


def test_excluded_layers_are_left_out_and_told() -> None:
    found = tied([("*.conv", "head")], NAMES, {"layer1.conv"})
    assert found.joins == (Join("tied", "head", "layer2.conv"),)
    assert found.missed == (Missed("tied", "layer1.conv", "it stays in float"),)
    assert tied([("*.fc",)], NAMES, set(NAMES)).joins == ()


@pytest.mark.parametrize(
    ("tie", "words"),
    [
        (("heads",), "no layer matches 'heads'; .* 'head'"),
        (("head", "nothing.*"), r"no layer matches 'nothing.\*'"),
        (("head",), r"the tie \('head',\) matches one layer, 'head'; a tie is of two or more"),
        (("head", "h*"), "matches one layer"),
    ],
)
def test_a_tie_needs_two_layers(tie: tuple[str, ...], words: str) -> None:
    with pytest.raises(PatternError, match=words):
        tied([tie], NAMES)
