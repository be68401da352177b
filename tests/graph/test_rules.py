from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from fxmpq.errors import PrecisionError, TargetError
from fxmpq.formats import Precision, Scheme
from fxmpq.granularity import Dynamic, PerBlock, PerChannel, PerTensor
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


DYNAMIC = OperatorRule(frozenset({8}), frozenset({8, None}), dynamic=frozenset({Dynamic.TENSOR}))


@pytest.mark.parametrize(
    ("name", "runs"),
    [("w8a8", True), ("w8a8d", True), ("w8a8dt", False), ("w8a4d", False), ("a8d", False)],
)
def test_a_rule_says_which_ranges_are_found_at_run_time(name: str, runs: bool) -> None:
    assert DYNAMIC.runs(Precision.parse(name)) is runs
    assert not RULES.operators["conv"].runs(Precision.parse("w8a8d"))
    assert "activations [8, float], dynamic ['d']" in DYNAMIC.describe()


def test_a_kind_that_only_stores_takes_the_weights_beside_a_dynamic_range() -> None:
    assert RULES.candidates_for("embedding", parsed("w4a8d")) == parsed("w4")


def test_float_always_runs() -> None:
    assert all(rule.runs(Precision()) for rule in RULES.operators.values())


def test_what_is_stored_if_it_is_read_is_among_the_outputs() -> None:
    stored = replace(RULES, quantize_outputs_of=frozenset({"conv", "add"}))
    assert replace(stored, stored_if_read=frozenset({"add"})).stored_if_read == {"add"}
    with pytest.raises(TargetError, match="stores what 'cat' returns if it is read so, but does"):
        replace(stored, stored_if_read=frozenset({"cat"}))


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
        "embedding: weights [4], activations [float], scales per channel"
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
        "conv: weights [4], activations [8, float], floats ['e2m1', 'e4m3'], scales per channel, "
        "per block; embedding: weights [4], activations [float], floats ['e4m3'], scales per "
        "channel; linear: weights [4], activations [8], scales per tensor"
    )


BLOCKS = OperatorRule(
    frozenset({4}),
    frozenset({8, None}),
    granularities=frozenset({PerChannel, PerBlock}),
    block_sizes=frozenset({32, 128}),
    blocks_are_weight_only=True,
)


@pytest.mark.parametrize(
    ("name", "runs", "in_any_block"),
    [
        *[("w4b32", True, True), ("w4b128", True, True), ("w4", True, True), ("w4a8", True, True)],
        *[("w4b64", False, True), ("w4b32a8", False, True), ("w4t", False, False)],
    ],
)
def test_blocks_can_have_some_sizes_and_float_activations_only(
    name: str, runs: bool, in_any_block: bool
) -> None:
    precision = Precision.parse(name)
    assert BLOCKS.runs(precision) is runs
    freed = replace(BLOCKS, block_sizes=frozenset(), blocks_are_weight_only=False)
    assert freed.runs(precision) is in_any_block
    assert BLOCKS.describe().endswith("scales per channel, per block of [32, 128] (weight-only)")
    assert freed.describe().endswith("scales per channel, per block")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"joins": ("shared_weight", "shared_input", "add")}, "by 'add'; there are 'added'"),
        ({"joins": ("shared_input",)}, "must join by 'shared_weight'"),
        ({"joins": ("shared_weight",)}, "must join by 'shared_input': what layers share is stored"),
        ({"fusions": (("conv",),)}, "a fusion is of two or more"),
        ({"fusions": (("conv", "rleu"),)}, "fuses 'rleu', which is neither a kind of layer nor"),
        ({"shared_ranges": frozenset({"concat_"})}, "shares ranges at 'concat_'"),
        ({"quantize_outputs_of": frozenset({"linear"})}, "outputs of 'linear', .*conv, embedding"),
        ({"quantize_outputs_of": frozenset({"relu"})}, "outputs of 'relu', which is neither"),
        (
            {"quantize_residuals_of": frozenset({"attn"})},
            "quantizes residuals of 'attn', which is not a kind of layer that it runs",
        ),
        ({"quantize_residuals_of": frozenset({"add"})}, "residuals of 'add', which is not"),
        (
            {"unsigned_outputs_of": frozenset({"sofmax"})},
            "unsigned outputs of 'sofmax', which is neither a kind of layer nor",
        ),
        (
            {"symmetric_inputs_of": frozenset({"gelu"})},
            "symmetric inputs of 'gelu', which is neither",
        ),
    ],
)
def test_rules_that_cannot_be_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(TargetError, match=words):
        replace(RULES, **options)


def test_a_target_that_stores_no_activation_needs_no_shared_inputs() -> None:
    weight_only = OperatorRule(frozenset({4}), frozenset({None}))
    rules = replace(RULES, operators={"linear": weight_only}, joins=("shared_weight",))
    assert rules.joins == ("shared_weight",)


PRODUCT = OperatorRule(
    frozenset(), frozenset({8, 16}), frozenset({Scheme.E4M3}), granularities=frozenset()
)


@pytest.mark.parametrize(
    ("name", "runs"),
    [
        *[("a8", True), ("a16", True), ("ae4m3", True), ("fp32", True)],
        *[("a4", False), ("ae5m2", False), ("w8a8", False), ("w8", False)],
    ],
)
def test_a_product_runs_activations_alone(name: str, runs: bool) -> None:
    assert PRODUCT.is_activation_only
    assert PRODUCT.runs(Precision.parse(name)) is runs
    assert PRODUCT.describe() == "activations [8, 16], floats ['e4m3']"


def test_activations_alone_are_of_products_only() -> None:
    assert not any(rule.runs(Precision(None, 8)) for rule in RULES.operators.values())


@pytest.mark.parametrize(
    ("kind", "name", "half"),
    [
        *[("conv", "w4a8", "w4a8"), ("conv", "w4", "w4"), ("conv", "a8", None)],
        *[("embedding", "w4a8", "w4"), ("embedding", "w4", "w4"), ("embedding", "a8", None)],
        *[("matmul", "w4a8", "a8"), ("matmul", "a8", "a8"), ("matmul", "w4", None)],
        *[(kind, "fp32", "fp32") for kind in ("conv", "embedding", "matmul")],
    ],
)
def test_each_kind_takes_its_half(kind: str, name: str, half: str | None) -> None:
    rule = {**RULES.operators, "matmul": PRODUCT}[kind]
    expected = None if half is None else Precision.parse(half)
    assert rule.half(Precision.parse(name)) == expected


def test_a_product_takes_the_activation_half_once() -> None:
    rules = replace(RULES, operators={**RULES.operators, "matmul": PRODUCT})
    wanted = parsed("w4a8", "w8a8", "w4", "a16", "fp32", "w4a4")
    assert rules.candidates_for("matmul", wanted) == parsed("a8", "a16", "fp32")
    assert rules.candidates_for("conv", wanted) == parsed("w4a8", "w8a8", "fp32")


def test_precisions_of_products_are_refused_unless_products_are_quantized() -> None:
    rules = replace(RULES, operators={**RULES.operators, "matmul": PRODUCT})
    rules.check(parsed("a8", "w4a8"), products=True)
    with pytest.raises(PrecisionError, match="a8 is of products .*; quantize them too with pro"):
        rules.check(parsed("w4a8", "a8"))
    with pytest.raises(PrecisionError, match="cannot run a4; it runs"):
        rules.check(parsed("a4"), products=True)


@pytest.mark.parametrize(
    ("name", "weights", "fits"),
    [
        *[("w4b64", 128, True), ("w4b64", 96, False), ("w4b128", 64, False)],
        *[("w8a8", 96, True), ("fp32", 96, True)],
    ],
)
def test_blocks_may_have_to_be_whole(name: str, weights: int, fits: bool) -> None:
    whole = replace(BLOCKS, blocks_are_whole=True)
    assert whole.fits(Precision.parse(name), weights) is fits
    assert BLOCKS.fits(Precision.parse(name), weights)


def test_a_rule_may_run_some_pairings_only() -> None:
    listed = frozenset(parsed("w4b32", "w8a8"))
    rule = replace(BLOCKS, weight_bits=frozenset({4, 8}), only=listed)
    names = ["w4", "w4b32", "w4a8", "w8", "w8b32", "w8a8"]
    assert [name for name in names if rule.runs(Precision.parse(name))] == ["w4b32", "w8a8"]
    assert rule.runs(Precision())
    assert rule.describe().endswith(": w4b32, w8a8")
    # What is listed must still be among what the sets allow.
    assert not replace(rule, weight_bits=frozenset({4})).runs(Precision(8, 8))
