"""How to calibrate: rules by name, checked before long work."""

from __future__ import annotations

from collections.abc import Mapping

from fxmpq.errors import FxmpqError
from fxmpq.graph.state import CalibrationOptions
from fxmpq.quantizers.ranges import RANGES
from fxmpq.quantizers.rule import RuleChoice, RuleText, choose_rule
from fxmpq.quantizers.weight_scale import WEIGHT_SCALES


def read_ranges(asked: RuleText) -> RuleChoice:
    """Read the rule of activation ranges: a key of `RANGES`, or a mapping with its options.

    Raises:
        FxmpqError: If there is no such rule or option, or an option has no legal value.

    Examples:
        >>> read_ranges({"rule": "percentile", "percentile": 99.9})
        RuleChoice(rule='percentile', options=(('percentile', 99.9),))
    """
    return choose_rule(asked, RANGES, "ranges")


def read_weight_scales(asked: RuleText) -> RuleChoice:
    """Read the rule of weight scales: a key of `WEIGHT_SCALES`, or a mapping with its options.

    Raises:
        FxmpqError: If there is no such rule or option, or an option has no legal value.

    Examples:
        >>> read_weight_scales("minmax")
        RuleChoice(rule='minmax', options=())
    """
    return choose_rule(asked, WEIGHT_SCALES, "weight_scales")


def read_options(
    ranges: RuleText,
    weight_scales: RuleText,
    bias_correction: bool,
    options: Mapping[str, object],
) -> CalibrationOptions:
    """Read and check everything that `calibrate` is asked for.

    Args:
        ranges: A rule, by name or as a mapping.
        weight_scales: The same.
        bias_correction: Whether quantized layers get corrected biases.
        options: Of the rule of ranges, where it is given by name.

    Raises:
        FxmpqError: If a rule or an option is unknown or has no legal value, or options are
            given in both places.

    Examples:
        >>> read_options("sigma", "mse", True, {"k": 3}).ranges.options
        (('k', 3.0),)
    """
    if options:
        if not isinstance(ranges, str):
            raise FxmpqError(
                f"options of the ranges are given beside a mapping: {', '.join(options)}; write "
                f"them into it, as in ranges={_example(ranges, options)}"
            )
        ranges = {"rule": ranges, **options}
    return CalibrationOptions(
        read_ranges(ranges), read_weight_scales(weight_scales), bool(bias_correction)
    )


def _example(ranges: Mapping[str, object] | RuleChoice, options: Mapping[str, object]) -> str:
    written = ranges.written if isinstance(ranges, RuleChoice) else ranges
    whole = {"rule": written} if isinstance(written, str) else dict(written)
    return repr({**whole, **options})
