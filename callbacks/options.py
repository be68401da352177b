"""Options that a callback passes on: whether `fxmpq.quantize` knows them."""

from __future__ import annotations

from collections.abc import Mapping

from fxmpq.sensitivity.measure import check_method


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
    check_method(method, [name for name in options if name != "bias_correction"])
