"""Measure: the estimators by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import fx

from fxmpq.errors import FxmpqError, closest
from fxmpq.graph.batches import materialize
from fxmpq.graph.calibration_identity import calibration_identity
from fxmpq.graph.state import require_groups
from fxmpq.graph.switch import without_choices
from fxmpq.identity import identity
from fxmpq.journal import Journal, data_digest
from fxmpq.sensitivity.entropy import entropy
from fxmpq.sensitivity.finetune import finetune
from fxmpq.sensitivity.hessian import hessian
from fxmpq.sensitivity.layer_loss import layer_loss
from fxmpq.sensitivity.learned_scales import learned_scales
from fxmpq.sensitivity.orthogonality import orthogonality
from fxmpq.sensitivity.pairwise import pairwise
from fxmpq.sensitivity.projected import projected
from fxmpq.sensitivity.scores import SCORES, OutputScore
from fxmpq.sensitivity.sensitivity import Sensitivity
from fxmpq.sensitivity.sqnr import sqnr
from fxmpq.work import Work


@dataclass(frozen=True)
class Method:
    """An estimator and what it needs.

    Args:
        estimate: `estimate(graph, batches, *, work, ...)`.
        labels: Whether it needs a `loss`, and so labels.
        interactions: Whether it measures those between groups.
    """

    estimate: Callable[..., Sensitivity]
    labels: bool = False
    interactions: bool = False


METHODS: Mapping[str, Method] = {
    "projected": Method(projected, interactions=True),
    "sqnr": Method(sqnr),
    "pairwise": Method(pairwise, interactions=True),
    "layer_loss": Method(layer_loss),
    "hessian": Method(hessian, labels=True),
    "orthogonality": Method(orthogonality),
    "entropy": Method(entropy),
    "learned_scales": Method(learned_scales, labels=True),
    "finetune": Method(finetune, labels=True),
}


def measure(
    graph: fx.GraphModule,
    batches: Iterable[Any],
    *,
    method: str = "projected",
    progress: bool = True,
    resume: str | Path | None = None,
    **options: object,
) -> Sensitivity:
    """Measure how much the output suffers per (group, precision).

    Args:
        graph: From `calibrate` or later. Losses are those of the float model, also where precisions
            are chosen already.
        batches: What the model takes, a few dozen samples; with a `loss` or another `score`
            that reads labels, what that takes.
        method: A key of `METHODS`; the guide says which to choose.
        progress: Whether to show progress bars.
        resume: A journal file. What is finished is recorded there, and an interrupted run that
            is called again with the same model, data, method and options goes on from it.
        **options: Of the method, as `probes=4, seed=1` for `projected`.

    Returns:
        What each group loses at each precision.

    Raises:
        FxmpqError: If the graph has no groups, the method or an option is unknown, or the method
            needs a `loss` and has none.
        CalibrationError: If there are no batches.

    Examples:
        >>> import torch, fxmpq
        >>> batches = [torch.randn(8, 4)]
        >>> graph = fxmpq.trace(torch.nn.Sequential(torch.nn.Linear(4, 2)), batches[0])
        >>> graph = fxmpq.calibrate(fxmpq.prepare(graph, "reference"), batches)
        >>> found = measure(graph, batches, method="sqnr")
        >>> found.value("0", "w8a8") < found.value("0", "w2a8")
        True
    """
    state = require_groups(graph, stage="calibrated")
    check_method(method, options)
    if state.choices:
        graph = without_choices(graph)
    found = materialize(batches)
    journal = None
    if resume is not None:
        journal = Journal(resume, _run(graph, found, method, options))
    work = Work(shown=progress, journal=journal)
    return METHODS[method].estimate(graph, found, work=work, **options)


def method_options(method: str) -> tuple[str, ...]:
    """Names of the options that a method takes.

    Examples:
        >>> "probes" in method_options("projected"), "probes" in method_options("sqnr")
        (True, False)
    """
    parameters = inspect.signature(METHODS[method].estimate).parameters
    # Every method takes the graph and the batches first.
    return tuple(name for name in tuple(parameters)[2:] if name != "work")


def check_method(method: str, options: Collection[str] = ()) -> None:
    """Refuse an unknown method, options that it does not take, and a missing loss.

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
    if METHODS[method].labels and "loss" not in options:
        free = ", ".join(repr(name) for name, entry in METHODS.items() if not entry.labels)
        raise FxmpqError(
            f"the method {method!r} needs labels: give loss=, a callable loss(model, batch) or "
            f"fxmpq.StepLoss(your LightningModule), and batches with labels. No labels are "
            f"needed by {free}"
        )


def reads_labels(method: str, options: Mapping[str, object]) -> bool:
    """Whether a method with these options takes what a loss or metric takes, labels included.

    All others take what the model takes.

    Args:
        method: A key of `METHODS`.
        options: Its options.

    Examples:
        >>> reads_labels("sqnr", {"score": "kl"}), reads_labels("hessian", {})
        (False, True)
    """
    score = options.get("score", "noise")
    compares = isinstance(score, OutputScore) or (isinstance(score, str) and score in SCORES)
    return METHODS[method].labels or not compares


def _run(
    graph: fx.GraphModule, batches: Sequence[object], method: str, options: Mapping[str, object]
) -> dict[str, object]:
    """What identifies a run: its journal is no other's."""
    parameters = inspect.signature(METHODS[method].estimate).parameters
    defaults = {name: parameters[name].default for name in method_options(method)}
    return {
        "method": method,
        "options": identity({**defaults, **options}),
        **calibration_identity(graph),
        "data": data_digest(batches),
    }
