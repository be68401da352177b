"""Options that a callback passes on: whether `fxmpq.quantize` knows them, and whose they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from fxmpq.calibration.options import read_ranges, read_weight_scales
from fxmpq.callbacks.labels import STEPS
from fxmpq.errors import FxmpqError, closest
from fxmpq.quantizers.rule import RuleText
from fxmpq.sensitivity.measure import METHODS, check_method
from fxmpq.sensitivity.scores import SCORES

_RULES = {"ranges": read_ranges, "weight_scales": read_weight_scales}
_NOT_OF_THE_METHOD = (*_RULES, "bias_correction", "resume")


def check_options(method: str, options: Mapping[str, object]) -> None:
    """Refuse unknown methods, rules and losses, and options that `fxmpq.quantize` does not know.

    Args:
        method: Sensitivity method.
        options: Further arguments for `fxmpq.quantize`.

    Raises:
        FxmpqError: With the legal names.

    Examples:
        >>> check_options("projected", {"probes": 4, "bias_correction": False})
    """
    names = [name for name in options if name not in _NOT_OF_THE_METHOD]
    # The module's own step gives a loss where none is named.
    labels = method in METHODS and METHODS[method].labels
    check_method(method, [*names, "loss"] if labels else names)
    for name, read in _RULES.items():
        if name in options:
            read(cast(RuleText, options[name]))
    for name, known in (("loss", STEPS), ("score", (*SCORES, *STEPS))):
        value = options.get(name)
        if isinstance(value, str) and value not in known:
            raise FxmpqError(
                f"no {name} {value!r}; there are {closest(value, known)}, or give a callable "
                "loss(model, batch)"
            )


def own_journal(options: Mapping[str, object], rank: int) -> dict[str, object]:
    """Give each process a journal of its own, for two cannot write to one.

    Args:
        options: Of the callback.
        rank: Of the process; the first keeps the name.

    Examples:
        >>> own_journal({"resume": "sweep.journal"}, 1)
        {'resume': 'sweep.journal.1'}
    """
    found = dict(options)
    if rank and found.get("resume") is not None:
        found["resume"] = f"{found['resume']}.{rank}"
    return found
