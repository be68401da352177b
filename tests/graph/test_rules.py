from __future__ import annotations

import pytest

from fxmpq.errors import PrecisionError
from fxmpq.formats import Precision, Scheme
from fxmpq.granularity import PerBlock, PerChannel, PerTensor
from fxmpq.graph.rules import OperatorRule, TargetRules

RULES = TargetRules(
    name="chip",
    operators={
        "conv": OperatorRule(frozenset({4, 8}), frozenset({8})),
        "embedding": OperatorRule(frozenset({4}), frozenset({None})),
    },
    default_candidates=(Precision(8, 8),),
)


def parsed(*names: str) -> list[Precision]:
    return [Precision.parse(name) for name in names]


@pytest.mark.parametrize(
    ("name", "runs"),
    [("w4a8", True), ("w8a8", True), ("w4a4", False), ("w2a8", False), ("w4", False)],
)
def test_a_rule_runs_its_widths(name: str, runs: bool) -> None:
    assert RULES.operators["conv"].runs(Precision.parse(name)) is runs


def test_float_always_runs() -> None:
    assert all(rule.runs(Precision()) for rule in RULES.operators.values())


def test_a_candidate_is_accepted_if_any_kind_runs_it() -> None:
    RULES.check(parsed("w4", "w8a8", "fp32"))


def test_a_candidate_that_nothing_runs_is_an_error() -> None:
    with pytest.raises(
        PrecisionError, match=r"'chip' cannot run w2a8; it runs conv: weights \[4, 8\]"
    ):
        RULES.check(parsed("w4a8", "w2a8"))


def test_candidates_are_kept_in_order_of_bits() -> None:
    wanted = parsed("w8a8", "w2a8", "w4a8", "fp32")
    assert RULES.candidates_for("conv", wanted) == parsed("w4a8", "w8a8", "fp32")


def test_a_kind_that_only_stores_takes_the_weight_half_once() -> None:
    assert RULES.candidates_for("embedding", parsed("w4a8", "w4a4", "w8a8")) == parsed("w4")


def test_the_description_names_every_kind() -> None:
    assert RULES.describe() == (
        "conv: weights [4, 8], activations [8], scales per channel; "
        "embedding: weights [4], activations [None], scales per channel"
    )


WIDE = TargetRules(
    name="wide",
    operators={
        "conv": OperatorRule(
            frozenset({4}),
            frozenset({None, 8}),
            frozenset({Scheme.E4M3, Scheme.E2M1}),
            frozenset({PerChannel, PerBlock}),
        ),
        "embedding": OperatorRule(frozenset({4}), frozenset({None}), frozenset({Scheme.E4M3})),
        "linear": OperatorRule(
            frozenset({4}), frozenset({8}), granularities=frozenset({PerTensor})
        ),
    },
    default_candidates=(Precision(4, 8),),
)


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("w4a8", {"conv"}),
        ("w4b32a8", {"conv"}),
        ("w4b32", {"conv"}),
        ("w4ta8", {"linear"}),
        ("we4m3ae4m3", {"conv"}),
        ("we4m3a8", {"conv"}),
        ("w4ae4m3", {"conv"}),
        ("we4m3", {"conv", "embedding"}),
        ("we2m1b16a8", {"conv"}),
        ("we2m1ta8", set()),
        ("we5m2a8", set()),
        ("we4m3ae5m2", set()),
        ("w8b32a8", set()),
    ],
)
def test_a_rule_runs_its_floats_and_granularities(name: str, kinds: set[str]) -> None:
    found = {kind for kind, rule in WIDE.operators.items() if rule.runs(Precision.parse(name))}
    assert found == kinds


def test_a_kind_that_only_stores_takes_float_weights_without_their_activations() -> None:
    wanted = parsed("we4m3ae4m3", "w4ae4m3", "we2m1ae4m3")
    assert WIDE.candidates_for("embedding", wanted) == parsed("w4", "we4m3")


def test_candidates_of_one_width_have_an_order_of_their_own() -> None:
    names = ["w4a8", "w4b128a8", "w4b32a8", "we2m1a8", "we2m1b16a8"]
    for wanted in (names, names[::-1]):
        assert WIDE.candidates_for("conv", parsed(*wanted)) == parsed(
            "w4a8", "we2m1a8", "w4b128a8", "w4b32a8", "we2m1b16a8"
        )


def test_the_description_names_floats_and_granularities() -> None:
    assert WIDE.describe() == (
        "conv: weights [4], activations [8, None], floats ['e2m1', 'e4m3'], scales per channel, "
        "per block; embedding: weights [4], activations [None], floats ['e4m3'], scales per "
        "channel; linear: weights [4], activations [8], scales per tensor"
    )
