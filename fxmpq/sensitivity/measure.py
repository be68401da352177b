"""Measure: the estimators by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping

from torch import fx

from fxmpq.errors import FxmpqError, closest
from fxmpq.graph.batches import Batch, materialize
from fxmpq.graph.state import require
from fxmpq.progress import track
from fxmpq.sensitivity.projected import projected
from fxmpq.sensitivity.sensitivity import Sensitivity
from fxmpq.sensitivity.sqnr import sqnr

METHODS: Mapping[str, Callable[..., Sensitivity]] = {"projected": projected, "sqnr": sqnr}


def measure(
    graph: fx.GraphModule,
    batches: Iterable[Batch],
    *,
    method: str = "projected",
    progress: bool = True,
    **options: object,
) -> Sensitivity:
    """Measure how much the output suffers per (group, precision).

    Args:
        graph: From `calibrate`.
        batches: What the model takes; a few dozen samples.
        method: `projected` (a few passes for everything) or `sqnr` (the exact sweep).
        progress: Whether to show a progress bar.
        **options: Of the method, as `probes=4, seed=1` for `projected`.

    Returns:
        Relative output noise power per group and precision.

    Raises:
        FxmpqError: If the method or an option is unknown.
        CalibrationError: If there are no batches.
    """
    require(graph, stage="calibrated")
    check_method(method, options)
    found = materialize(batches)
    return METHODS[method](graph, track(found, "measuring", shown=progress), **options)


def method_options(method: str) -> tuple[str, ...]:
    """Names of the options that a method takes.

    Examples:
        >>> method_options("projected")
        ('probes', 'seed')
    """
    # Every method takes the graph and the batches first.
    return tuple(inspect.signature(METHODS[method]).parameters)[2:]


def check_method(method: str, options: Iterable[str] = ()) -> None:
    """Refuse an unknown method, and options that it does not take.

    Args:
        method: As asked.
        options: Names of the options as asked.

    Raises:
        FxmpqError: With the methods or options there are.
    """
    if method not in METHODS:
        raise FxmpqError(f"no sensitivity method {method!r}; there are {closest(method, METHODS)}")
    legal = method_options(method)
    for name in options:
        if name not in legal:
            raise FxmpqError(
                f"no option {name!r} with the method {method!r}; there are {closest(name, legal)}"
            )
