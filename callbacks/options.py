"""Options that a callback passes on: whether `fxmpq.quantize` knows them, and whose they are."""

from __future__ import annotations

from collections.abc import Mapping

from fxmpq.callbacks.labels import STEPS
from fxmpq.errors import FxmpqError, closest
from fxmpq.sensitivity.measure import METHODS, check_method
from fxmpq.sensitivity.scores import SCORES


def check_options(method: str, options: Mapping[str, object]) -> None:
    """Refuse an unknown method, options that `fxmpq.quantize` would not know, and unknown losses.

    Args:
        method: Sensitivity method.
        options: Further arguments for `fxmpq.quantize`.

    Raises:
        FxmpqError: With the legal names.

    Examples:
        >>> check_options("projected", {"probes": 4, "bias_correction": False})
    """
    names = [name for name in options if name not in ("bias_correction", "resume")]
    # The module's own step gives a loss where none is named.
    labels = method in METHODS and METHODS[method].labels
    check_method(method, [*names, "loss"] if labels else names)
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
