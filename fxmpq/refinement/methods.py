"""The refinement methods and the recipes made of them: one table each."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from fxmpq.errors import FxmpqError, closest
from fxmpq.graph.state import Refinement
from fxmpq.refinement.adaquant import adaquant
from fxmpq.refinement.adaround import adaround
from fxmpq.refinement.bias_correction import bias_correction
from fxmpq.refinement.bias_tuning import bias_tuning
from fxmpq.refinement.brecq import brecq
from fxmpq.refinement.equalization import equalization
from fxmpq.refinement.gptq import gptq
from fxmpq.refinement.norm_reestimation import norm_reestimation
from fxmpq.refinement.qat import qat

Refine = Callable[..., list[Refinement]]
"""Called with `(graph, batches, units=..., **options)`; changes `graph` in place."""


@dataclass(frozen=True)
class Method:
    """One way to refine.

    Args:
        refine: Does it, in place on a planned graph, and says what it did.
        rounds: Whether it only finds codes, one weight width as well as another, so that it can
            run before there is a plan.
        trains: Whether it takes batches as a loss takes them, labels included.
    """

    refine: Refine
    rounds: bool = False
    trains: bool = False


METHODS: Mapping[str, Method] = {
    "equalization": Method(equalization),
    "bias_correction": Method(bias_correction),
    "gptq": Method(gptq, rounds=True),
    "adaround": Method(adaround, rounds=True),
    "adaquant": Method(adaquant),
    "brecq": Method(brecq),
    "norm_reestimation": Method(norm_reestimation),
    "bias_tuning": Method(bias_tuning),
    "qat": Method(qat, trains=True),
}

RECIPES: Mapping[str, tuple[str, ...]] = {
    "light": ("gptq",),
    "advanced": ("equalization", "gptq"),
}


def methods_of(name: str) -> tuple[str, ...]:
    """The methods that a name stands for: a recipe's in their order, or itself alone.

    Raises:
        FxmpqError: If there is neither a recipe nor a method of this name.
    """
    if name in RECIPES:
        return RECIPES[name]
    if name in METHODS:
        return (name,)
    raise FxmpqError(
        f"no refinement {name!r}; closest: {closest(name, [*RECIPES, *METHODS])}. Recipes: "
        f"{', '.join(RECIPES) or 'none'}; methods: {', '.join(METHODS) or 'none'}"
    )


def options_of(name: str) -> dict[str, object]:
    """The options that one method takes, with their defaults.

    Args:
        name: A key of `METHODS`.

    Returns:
        Defaults by option name; `None` for an option without one.
    """
    empty = inspect.Parameter.empty
    return {
        option: None if default is empty else default for option, default in _defaults(name).items()
    }


def needed_options(name: str) -> tuple[str, ...]:
    """The options without which a method cannot work.

    Args:
        name: A key of `METHODS`.
    """
    empty = inspect.Parameter.empty
    return tuple(option for option, default in _defaults(name).items() if default is empty)


def _defaults(name: str) -> dict[str, object]:
    found = inspect.signature(METHODS[name].refine).parameters.values()
    return {
        entry.name: entry.default
        for entry in found
        if entry.kind is inspect.Parameter.KEYWORD_ONLY and entry.name != "units"
    }
