from __future__ import annotations

import pytest

from fxmpq.errors import PrecisionError
from fxmpq.formats import Precision
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
        "conv: weights [4, 8], activations [8]; embedding: weights [4], activations [None]"
    )
