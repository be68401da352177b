from __future__ import annotations

import pytest

from fxmpq.calibration.options import read_options, read_ranges, read_weight_scales
from fxmpq.errors import FxmpqError
from fxmpq.quantizers.ranges import RANGES
from fxmpq.quantizers.rule import RuleChoice
from fxmpq.quantizers.weight_scale import WEIGHT_SCALES


@pytest.mark.parametrize("name", RANGES)
def test_every_rule_of_ranges_can_be_chosen(name: str) -> None:
    found = read_ranges(name)
    assert found.rule == name
    assert [option for option, _ in found.options] == list(RANGES[name].options)


@pytest.mark.parametrize("name", WEIGHT_SCALES)
def test_every_rule_of_weight_scales_can_be_chosen(name: str) -> None:
    assert read_weight_scales(name).rule == name


def test_each_argument_has_its_own_table() -> None:
    with pytest.raises(FxmpqError, match="no rule 'percentil' for ranges; .*'percentile'"):
        read_ranges("percentil")
    with pytest.raises(FxmpqError, match="no rule 'percentile' for weight_scales"):
        read_weight_scales("percentile")


def test_options_beside_a_name_are_those_inside_a_mapping() -> None:
    beside = read_options("percentile", "mse", False, {"percentile": 99})
    inside = read_options({"rule": "percentile", "percentile": 99.0}, "mse", False, {})
    assert beside == inside
    assert not beside.bias_correction
    assert beside.weight_scales == RuleChoice("mse", (("p", 2.0),))


@pytest.mark.parametrize(
    "ranges", [{"rule": "mse"}, {"rule": "mse", "p": 2}, RuleChoice("mse", (("p", 2.0),))]
)
def test_options_in_both_places_are_refused(ranges: object) -> None:
    with pytest.raises(FxmpqError, match=r"beside a mapping: p; .*'rule': 'mse', 'p': 3"):
        read_options(ranges, "mse", True, {"p": 3})


def test_options_are_of_the_ranges() -> None:
    """`p` beside two rules that both take one goes to the ranges."""
    found = read_options("mse", "mse", True, {"p": 2.4})
    assert (dict(found.ranges.options), dict(found.weight_scales.options)) == (
        {"p": 2.4},
        {"p": 2.0},
    )
    with pytest.raises(FxmpqError, match="'minmax' for ranges has no option 'p'; it takes none"):
        read_options("minmax", "mse", True, {"p": 2.4})
