"""Options that a callback passes on: whether `fxmpq.quantize` knows them."""

from __future__ import annotations

from collections.abc import Mapping

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
    names = [name for name in options if name not in ("bias_correction", "resume")]
    # The module's own step gives a loss where none is named.
    labels = method in METHODS and METHODS[method].labels
    check_method(method, [*names, "loss"] if labels else names)
