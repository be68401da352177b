"""Rules by name: which one is chosen, with which options, checked before long work."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from fxmpq.errors import FxmpqError, closest

Find = TypeVar("Find")


@dataclass(frozen=True)
class RuleOption:
    """A number that a rule takes.

    Args:
        default: What it is unless one is given.
        above: It must be greater than this.
        at_most: It must not be greater than this; infinity itself is never taken.
    """

    default: float
    above: float
    at_most: float = math.inf

    def describe(self) -> str:
        """The legal values, for people."""
        upper = "" if self.at_most == math.inf else f" and at most {self.at_most:g}"
        return f"greater than {self.above:g}{upper}"


@dataclass(frozen=True)
class Rule(Generic[Find]):
    """A way to find ranges or scales.

    Args:
        find: Does it; takes the options by name.
        options: The numbers it takes.
    """

    find: Find
    options: Mapping[str, RuleOption] = field(default_factory=dict)


@dataclass(frozen=True)
class RuleChoice:
    """A rule's name and all its options, defaults filled in.

    Args:
        rule: Key of the table of rules.
        options: Names and values, in the table's order.

    Examples:
        >>> RuleChoice("percentile", (("percentile", 99.9),)).written
        {'rule': 'percentile', 'percentile': 99.9}
        >>> RuleChoice("minmax").written
        'minmax'
    """

    rule: str
    options: tuple[tuple[str, float], ...] = ()

    @property
    def written(self) -> str | dict[str, object]:
        """As a user writes it: the name, or a mapping if there are options."""
        return {"rule": self.rule, **dict(self.options)} if self.options else self.rule


RuleText = str | Mapping[str, object] | RuleChoice
"""How a rule is asked for: `"mse"`, or `{"rule": "mse", "p": 2.4}` with options."""


def choose_rule(asked: RuleText, rules: Mapping[str, Rule[Find]], what: str) -> RuleChoice:
    """Read a rule's name or mapping and check it against a table.

    Args:
        asked: As `"percentile"` or `{"rule": "percentile", "percentile": 99.9}`.
        rules: The table.
        what: The argument's name, for errors.

    Returns:
        The rule with every option.

    Raises:
        FxmpqError: If there is no such rule (with the closest), the rule takes no such option,
            or an option has no legal value.

    Examples:
        >>> from fxmpq.quantizers.ranges import RANGES
        >>> choose_rule("sigma", RANGES, "ranges")
        RuleChoice(rule='sigma', options=(('k', 3.5),))
    """
    if isinstance(asked, RuleChoice):
        asked = asked.written
    given: Mapping[str, object] = {"rule": asked} if isinstance(asked, str) else asked
    if not isinstance(given, Mapping) or not isinstance(given.get("rule"), str):
        raise FxmpqError(
            f"{what} is the name of a rule, or a mapping with its name and options such as "
            f'{{"rule": "mse", "p": 2.4}}; found {asked!r}. Rules: {", ".join(rules)}'
        )
    name = str(given["rule"])
    if name not in rules:
        raise FxmpqError(f"no rule {name!r} for {what}; there are {closest(name, rules)}")
    legal = rules[name].options
    for option in given:
        if option != "rule" and option not in legal:
            known = f"it takes {closest(str(option), legal)}" if legal else "it takes none"
            raise FxmpqError(f"the rule {name!r} for {what} has no option {option!r}; {known}")
    values = (
        (option, _number(given.get(option, entry.default), entry, f"{what}: {name}'s {option}"))
        for option, entry in legal.items()
    )
    return RuleChoice(name, tuple(values))


def _number(value: object, option: RuleOption, what: str) -> float:
    number = math.nan
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        number = float(value)
    # NaN is in no interval, and infinity is no answer where there is no upper end.
    if option.above < number <= option.at_most and number != math.inf:
        return number
    raise FxmpqError(f"{what} must be a number {option.describe()}; found {value!r}")
