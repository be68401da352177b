from __future__ import annotations

import math

import pytest

from fxmpq.errors import FxmpqError
from fxmpq.quantizers.ranges import RANGES
from fxmpq.quantizers.rule import Rule, RuleChoice, RuleOption, choose_rule
from fxmpq.quantizers.weight_scale import WEIGHT_SCALES

RULES = {
    "plain": Rule(min),
    "tuned": Rule(max, {"a": RuleOption(2.0, 1, 3), "b": RuleOption(5, 0)}),
}


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ("plain", RuleChoice("plain")),
        ({"rule": "plain"}, RuleChoice("plain")),
        ("tuned", RuleChoice("tuned", (("a", 2.0), ("b", 5.0)))),
        ({"rule": "tuned", "b": 7}, RuleChoice("tuned", (("a", 2.0), ("b", 7.0)))),
        ({"b": 1, "a": 3, "rule": "tuned"}, RuleChoice("tuned", (("a", 3.0), ("b", 1.0)))),
    ],
)
def test_a_choice_is_whole_and_in_the_tables_order(asked: object, found: RuleChoice) -> None:
    assert choose_rule(asked, RULES, "ranges") == found
    assert choose_rule(found, RULES, "ranges") == found
    assert choose_rule(found.written, RULES, "ranges") == found


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ("tunde", r"no rule 'tunde' for ranges; there are 'tuned'"),
        ({"rule": "x"}, r"no rule 'x' for ranges; there are 'plain', 'tuned'"),
        ({"rule": "plain", "a": 1}, r"'plain' for ranges has no option 'a'; it takes none"),
        ({"rule": "tuned", "c": 1}, r"'tuned' for ranges has no option 'c'; it takes 'a', 'b'"),
        ({"rule": "tuned", "a": 1}, r"tuned's a must be a number greater than 1 and at most 3"),
        ({"rule": "tuned", "a": 3.01}, r"found 3.01"),
        ({"rule": "tuned", "b": 0}, r"tuned's b must be a number greater than 0; found 0"),
        ({"rule": "tuned", "b": math.inf}, r"found inf"),
        ({"rule": "tuned", "b": math.nan}, r"found nan"),
        ({"rule": "tuned", "b": True}, r"found True"),
        ({"rule": "tuned", "b": "2"}, r"found '2'"),
        ({"rule": "tuned", "b": None}, r"found None"),
        ({"a": 2}, r"ranges is the name of a rule, .* Rules: plain, tuned"),
        ({"rule": 3}, r"found \{'rule': 3\}"),
        (3, r"found 3"),
        (None, r"found None"),
    ],
)
def test_mistakes_say_what_would_work(asked: object, words: str) -> None:
    with pytest.raises(FxmpqError, match=words):
        choose_rule(asked, RULES, "ranges")


@pytest.mark.parametrize(
    ("table", "rule", "option", "bad", "good"),
    [
        (RANGES, "percentile", "percentile", (50, 100.1, 0, -1), (50.1, 99.9, 100)),
        (RANGES, "mse", "p", (0, -2.0), (0.5, 2, 2.4)),
        (RANGES, "sigma", "k", (0, -3.5), (0.1, 6)),
        (WEIGHT_SCALES, "mse", "p", (0, -2.0), (1, 2.4)),
    ],
)
def test_the_intervals_of_the_real_rules(
    table: dict, rule: str, option: str, bad: tuple[float, ...], good: tuple[float, ...]
) -> None:
    for value in bad:
        with pytest.raises(FxmpqError, match=f"{rule}'s {option} must be a number"):
            choose_rule({"rule": rule, option: value}, table, "ranges")
    for value in good:
        found = choose_rule({"rule": rule, option: value}, table, "ranges")
        assert found.options == ((option, float(value)),)


@pytest.mark.parametrize("table", [RANGES, WEIGHT_SCALES])
def test_defaults_are_those_of_the_functions(table: dict) -> None:
    for rule in table.values():
        defaults = dict(rule.find.__kwdefaults__ or {})
        # Which zero points a range may have is the target's to say, not the user's.
        defaults.pop("is_symmetric", None)
        assert defaults == {name: option.default for name, option in rule.options.items()}
