"""Options that a callback passes on: whether `fxmpq.quantize` knows them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

from fxmpq.errors import FxmpqError, closest
from fxmpq.sensitivity.measure import METHODS, check_method


def check_options(method: str, options: Mapping[str, object]) -> None:
    """Refuse an unknown method, and options that `fxmpq.quantize` would not know with it.

    Args:
        method: Sensitivity method.
        options: Further arguments for `fxmpq.quantize`.

    Raises:
        FxmpqError: With the legal names.

    Examples:
        >>> check_options("projected", {"probes": 4, "bias_correction": False})
    """
    check_method(method)
    # A method takes the graph and the batches first.
    legal = ["bias_correction", *list(inspect.signature(METHODS[method]).parameters)[2:]]
    for name in options:
        if name not in legal:
            raise FxmpqError(
                f"no option {name!r} with the method {method!r}; there are {closest(name, legal)}"
            )
