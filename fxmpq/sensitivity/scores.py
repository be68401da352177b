"""Scores: what is measured at the output of a changed network, and the sweep over all changes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from fxmpq.errors import FxmpqError, closest
from fxmpq.graph.batches import batch_size, flat_inputs, graph_device
from fxmpq.graph.run import flatten_outputs, float_outputs
from fxmpq.sensitivity.signal import check_samples, check_signal
from fxmpq.sensitivity.sweep import Changes, Sweep, SweptModel
from fxmpq.training.loss import (
    LossFunction,
    batch_samples,
    check_was_run,
    divergences,
    loss_value,
    on_device,
)

if TYPE_CHECKING:
    from torchmetrics import Metric
    from typing_extensions import TypeIs


@dataclass(frozen=True)
class OutputScore:
    """A score that compares outputs with the float model's: it needs no labels.

    The score is `finish(sum of parts / sum of weights)` over all batches.

    Args:
        unit: What it measures, one of the units of `Sensitivity`.
        read: From flat outputs and the number of samples to the tensor that is compared.
        weight: Of one batch's float tensor.
        part: Of one batch's float tensor and changed tensor.
        finish: From the mean to the score.
    """

    unit: str
    read: Callable[[Sequence[object], int], Tensor]
    weight: Callable[[Tensor], float]
    part: Callable[[Tensor, Tensor], float]
    finish: Callable[[float], float] = float


_LEAST_RATIO = 1e-12
"""Noise over signal below which a sample's SQNR grows no more."""

Score: TypeAlias = "OutputScore | LossFunction | Metric"
Asked: TypeAlias = "str | Score"


def power(reference: Tensor) -> float:
    """Signal power of one batch, `sum y^2`; it must be finite."""
    found = float(reference.double().square().sum())
    if found != 0:
        check_signal(found)
    return found


def noise(reference: Tensor, found: Tensor) -> float:
    """Noise power of one batch, `sum (y_q - y)^2`."""
    return float((found - reference).double().square().sum())


def sample_count(reference: Tensor) -> float:
    """Number of samples in one batch, each of which must have a signal."""
    check_samples(reference.double().square().sum(1))
    return float(len(reference))


def sample_ratios(reference: Tensor, found: Tensor) -> Tensor:
    """Each sample's noise over its signal, `||y_qn - y_n||^2 / ||y_n||^2`, shape `[samples]`."""
    powers = reference.double().square().sum(1)
    return (found - reference).double().square().sum(1) / powers


def sample_noise(reference: Tensor, found: Tensor) -> float:
    """Sum over samples of noise over signal."""
    return float(sample_ratios(reference, found).sum())


def sample_sqnr(reference: Tensor, found: Tensor) -> float:
    """Sum over samples of signal over noise, each at most `1e12`."""
    return float(sample_ratios(reference, found).clamp(min=_LEAST_RATIO).reciprocal().sum())


def inverse(mean: float) -> float:
    """From a mean SQNR to noise over signal."""
    return 1 / mean


def logits(outputs: Sequence[object], samples: int) -> Tensor:
    """The first floating-point output, whose last dimension are classes.

    Raises:
        FxmpqError: If there is none, or it has fewer than two classes.
    """
    found = float_outputs(outputs)
    if not found or found[0].dim() == 0 or found[0].shape[-1] < 2:
        shape = list(found[0].shape) if found else "no floating-point output"
        raise FxmpqError(
            "the score 'kl' reads the model's first floating-point output as logits, with two or "
            f"more classes in the last dimension; found {shape}. Take score='noise', or a loss"
        )
    return found[0]


def rows(reference: Tensor) -> float:
    """Number of distributions in logits `[..., classes]`."""
    return float(reference.numel() // reference.shape[-1])


def divergence(reference: Tensor, found: Tensor) -> float:
    """Sum over distributions of `KL(softmax(reference) || softmax(found))`, in nats.

    Args:
        reference: Float logits, `[..., classes]`; a class at minus infinity has no share.
        found: Changed logits of the same shape.
    """
    return float(divergences(reference.double(), found.double()).sum())


SCORES: Mapping[str, OutputScore] = {
    "noise": OutputScore("noise", flatten_outputs, power, noise),
    "kl": OutputScore("loss", logits, rows, divergence),
}
"""Scores by name; a loss callable and a torchmetrics metric are scores too."""

AVERAGES: Mapping[str, OutputScore] = {
    "ratio": SCORES["noise"],
    "samples": OutputScore("noise", flatten_outputs, sample_count, sample_noise),
    "sqnr": OutputScore("score", flatten_outputs, sample_count, sample_sqnr, inverse),
}
"""How noise is averaged over samples."""


def find_score(asked: Asked) -> Score:
    """The score that is asked for, refused if it is none.

    Args:
        asked: A name from `SCORES`, a callable `loss(model, batch)`, or a metric.

    Raises:
        FxmpqError: If the name is unknown, a metric does not say which way is better, or it is
            something else.
    """
    if isinstance(asked, str):
        if asked not in SCORES:
            raise FxmpqError(
                f"no score {asked!r}; there are {closest(asked, SCORES)}, a callable "
                "loss(model, batch) and torchmetrics metrics"
            )
        return SCORES[asked]
    if is_metric(asked):
        if asked.higher_is_better is None:
            raise FxmpqError(
                f"{type(asked).__name__} does not say whether higher is better, so a change for "
                "the worse is unknown; set `higher_is_better` in a subclass of it"
            )
        return asked
    if isinstance(asked, nn.Module) or not (callable(asked) or isinstance(asked, OutputScore)):
        raise FxmpqError(
            f"{type(asked).__name__} is no score; give one of {', '.join(map(repr, SCORES))}, a "
            "callable loss(model, batch), StepLoss(module) for a LightningModule, or a "
            "torchmetrics metric"
        )
    return asked


def is_metric(score: object) -> TypeIs[Metric]:
    """Whether a score is a torchmetrics metric.

    Whoever has one has imported torchmetrics, which takes seconds; nobody else need.

    Args:
        score: Anything.
    """
    kind = getattr(sys.modules.get("torchmetrics"), "Metric", None)
    return kind is not None and isinstance(score, kind)


def unit_of(score: Score) -> str:
    """The unit of a sensitivity measured with a score."""
    return score.unit if isinstance(score, OutputScore) else "loss"


class Scorer(Protocol):
    """Scores one batch at a time; totals are sums of parts over sums of weights."""

    def start(self, batch: Any) -> list[float]:  # noqa: ANN401 - whatever the user's loss takes
        """Run the base on a batch; returns its part and the batch's weight."""

    def part(self, changes: Changes) -> float:
        """The part of the started batch under changes."""


class OutputScorer:
    """Scores a sweep's outputs against those of the float graph.

    Args:
        score: How they are compared.
        sweep: Its base may be quantized; the comparison is with float all the same.
    """

    def __init__(self, score: OutputScore, sweep: Sweep) -> None:
        self._score = score
        self._sweep = sweep
        self._samples = 1
        self._reference = torch.empty(0)

    def start(self, batch: Any) -> list[float]:  # noqa: ANN401 - as the protocol says
        """Run the float graph and the base on what the model takes."""
        inputs = flat_inputs(self._sweep.network, batch)
        self._samples = batch_size(inputs)
        outputs = reference = self._sweep.start(inputs)
        if not self._sweep.is_float:
            reference = self._sweep.whole(inputs, dict.fromkeys(self._sweep.groups, "fp32"))
        self._reference = self._score.read(reference, self._samples)
        weight = self._score.weight(self._reference)
        return [self._compare(outputs), weight]

    def part(self, changes: Changes) -> float:
        """Compare the outputs under changes."""
        return self._compare(self._sweep.outputs(changes))

    def _compare(self, outputs: Sequence[object]) -> float:
        return self._score.part(self._reference, self._score.read(outputs, self._samples))


class LossScorer:
    """Scores a sweep by a loss that runs the model itself: parts are `loss * samples`.

    Args:
        loss: `loss(model, batch)`, the mean over samples; the same for the same outputs.
        sweep: Whose outputs the model returns.
    """

    def __init__(self, loss: LossFunction, sweep: Sweep) -> None:
        self._loss = loss
        self._model = SweptModel(sweep)
        self._batch: Any = None

    def start(self, batch: Any) -> list[float]:  # noqa: ANN401 - as the protocol says
        """Compute the loss of the base.

        Raises:
            FxmpqError: If the loss never runs the model, or returns no scalar.
        """
        self._model.begin()
        self._batch = on_device(batch, graph_device(self._model.network))
        value = self.part({})
        check_was_run(self._model.is_started)
        return [value, float(batch_samples(batch))]

    def part(self, changes: Changes) -> float:
        """Compute the loss under changes."""
        self._model.changes = changes
        found = loss_value(self._loss, self._model, self._batch)
        return float(found) * batch_samples(self._batch)


def scorer(score: OutputScore | LossFunction, sweep: Sweep) -> Scorer:
    """Attach a score that decomposes over batches to a sweep."""
    if isinstance(score, OutputScore):
        return OutputScorer(score, sweep)
    return LossScorer(score, sweep)


class StartedOnce:
    """One batch under a score; its base runs only once, and only if something asks for it.

    Args:
        scorer: Scores the batch.
        batch: What the scorer takes.
    """

    def __init__(self, scorer: Scorer, batch: Any) -> None:  # noqa: ANN401 - as the protocol says
        self._scorer = scorer
        self._batch = batch
        self._base: list[float] | None = None

    def base(self) -> list[float]:
        """The base's part and the batch's weight."""
        if self._base is None:
            self._base = self._scorer.start(self._batch)
        return self._base

    def parts(self, entries: Sequence[Changes]) -> list[float]:
        """The part of each entry."""
        self.base()
        return [self._scorer.part(changes) for changes in entries]
