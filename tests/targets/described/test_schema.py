from __future__ import annotations

import pytest
from pydantic import ValidationError

from fxmpq.formats import Precision, Scheme
from fxmpq.granularity import Dynamic, PerBlock, PerChannel
from fxmpq.graph.rules import OperatorRule
from fxmpq.targets.described.schema import Metric, Operator


def test_an_operator_becomes_a_rule() -> None:
    found = Operator(
        weights=(4, 8), activations=(8, "float"), floats=("e4m3",), scales=("channel", "block")
    )
    assert found.rule("conv") == OperatorRule(
        frozenset({4, 8}),
        frozenset({8, None}),
        frozenset({Scheme.E4M3}),
        frozenset({PerChannel, PerBlock}),
    )


def test_ranges_found_at_run_time_are_said() -> None:
    rule = Operator(weights=(8,), activations=(8,), dynamic=("tensor", "row")).rule("linear")
    assert rule.dynamic == frozenset(Dynamic)
    assert rule.runs(Precision.parse("w8a8dt"))
    assert not Operator(weights=(8,), activations=(8,)).rule("linear").dynamic


def test_integer_biases_are_in_units_of_both_scales() -> None:
    operator = Operator(weights=(8,), activations=(8,), integer_biases=True)
    assert operator.rule("conv").bias_width == 0
    assert Operator(weights=(8,)).rule("conv").bias_width is None


def test_by_default_weights_alone_are_in_few_bits() -> None:
    assert Operator(weights=(8,)).rule("embedding").is_weight_only


def test_a_product_of_activations_has_no_weights() -> None:
    assert Operator(activations=(8,)).rule("matmul").is_activation_only


def test_a_kind_takes_what_it_leaves_out_from_the_metric() -> None:
    metric = Metric.model_validate(
        {
            "per_model": 3,
            "per_layer": 5,
            "per_weight_byte": 2,
            "per_mac": {"w8a8": 1, "fp32": 8},
            "operators": {"conv": {"macs_per_unit": {"w8a8": 4}, "per_layer": 0}},
        }
    )
    found = metric.named("cycles")
    assert (found.metric, found.per_model) == ("cycles", 3)
    assert found.of("linear") == found.general
    conv = found.of("conv")
    assert conv.per_mac == {"w8a8": 0.25, "fp32": 8}
    assert (conv.per_layer, conv.per_weight_byte) == (0, 2)


def test_precision_names_are_read_as_everywhere() -> None:
    assert list(Metric(per_mac={" W8A8": 1}).per_mac) == ["w8a8"]
    with pytest.raises(ValidationError, match="cannot read the precision"):
        Metric(per_mac={"int8": 1})
