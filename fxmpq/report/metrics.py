"""What a model's outputs are worth: accuracy, perplexity, and SQNR against float outputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from fxmpq.errors import BatchError
from fxmpq.graph.batches import Batch
from fxmpq.graph.run import float_outputs
from fxmpq.wording import change, percent, points

Run = Callable[[Batch], Sequence[object]]
"""Takes a batch as the model does and returns its flat outputs."""

IGNORED = -100
"""The label of a token that does not count."""


@dataclass(frozen=True)
class Metric:
    """A figure of merit: a function of a mean over samples or tokens.

    Args:
        name: For people and reports.
        total: Takes one batch's outputs and labels; returns a sum and over how many it is.
        finish: Makes the figure of the mean.
        text: Writes a figure, with so many digits behind the point.
        difference: Writes how far a figure is from float's.
        heading: Of a column of differences.
        unit: Behind a difference in a sentence.
        short: The name where there is little room.
    """

    name: str
    total: Callable[[Sequence[Tensor], Tensor], tuple[float, int]]
    finish: Callable[[float], float]
    text: Callable[[float, int], str]
    difference: Callable[[float, float], str]
    heading: str
    unit: str
    short: str


class Tally:
    """Adds up a metric and the output SQNR batch by batch, so that no outputs need be kept.

    The SQNR is `10 log10(sum ||y||^2 / sum ||z - y||^2)` over all samples and outputs.

    Args:
        metric: What to add up.

    Examples:
        >>> tally = Tally(METRICS["accuracy"])
        >>> tally.add([torch.tensor([[2.0, 1.0], [0.0, 3.0]])], torch.tensor([0, 0]))
        >>> tally.value
        0.5
    """

    def __init__(self, metric: Metric) -> None:
        self._metric = metric
        self._sum = self._signal = self._noise = 0.0
        self._count = 0

    def add(
        self,
        outputs: Sequence[Tensor],
        labels: Tensor,
        reference: Sequence[Tensor] | None = None,
    ) -> None:
        """Add one batch.

        Args:
            outputs: The model's, as `collect_outputs` gives them.
            labels: Of the batch's samples.
            reference: The float model's outputs on the same batch.

        Raises:
            BatchError: If the labels do not fit the outputs, or the outputs the reference.
        """
        found, count = self._metric.total(outputs, labels)
        self._sum, self._count = self._sum + found, self._count + count
        if reference is not None:
            signal, noise = _powers(reference, outputs)
            self._signal, self._noise = self._signal + signal, self._noise + noise

    @property
    def value(self) -> float:
        """The metric over all batches."""
        if not self._count:
            raise BatchError(f"{self._metric.name} of no labels: every one of them is left out")
        return self._metric.finish(self._sum / self._count)

    @property
    def sqnr_db(self) -> float:
        """The SQNR over all batches in dB; `inf` where there is no difference."""
        return _decibels(self._signal, self._noise)


def collect_outputs(run: Run, batches: Iterable[Batch]) -> list[list[Tensor]]:
    """Run every batch and keep its floating-point outputs.

    Args:
        run: A runnable model, as `Converted.run`.
        batches: What the model takes.

    Returns:
        Per batch, the outputs on the CPU in the model's order.
    """
    with torch.no_grad():
        return [[tensor.cpu() for tensor in float_outputs(list(run(batch)))] for batch in batches]


def count_right(outputs: Sequence[Tensor], labels: Tensor) -> tuple[float, int]:
    """How many samples have their highest logit at the label, and how many there are.

    Args:
        outputs: Of one batch; the first holds the logits, `[samples, classes]`.
        labels: Classes, int64 `[samples]`.

    Raises:
        BatchError: If there are no logits, or another number of labels than of samples, or a
            label beyond the model's classes.

    Examples:
        >>> logits = torch.tensor([[2.0, 1.0], [0.0, 3.0], [5.0, 4.0]])
        >>> count_right([logits], torch.tensor([0, 1, 1]))
        (2.0, 3)
    """
    if not outputs or outputs[0].dim() != 2:
        raise BatchError(
            f"accuracy needs logits of shape [samples, classes] as the model's first output; "
            f"found {_shape_of(outputs)}"
        )
    logits = outputs[0]
    if len(labels) != len(logits):
        raise BatchError(f"there are {len(labels)} labels for {len(logits)} samples")
    _check_range("labels", labels, "classes", logits.shape[1])
    return float((logits.argmax(dim=1) == labels).sum()), len(labels)


def next_token_loss(outputs: Sequence[Tensor], labels: Tensor) -> tuple[float, int]:
    """Sum of `-log p(next token)` over the tokens that have one before them, and their number.

    Args:
        outputs: Of one batch; the first holds the logits, `[samples, length, vocabulary]`.
        labels: Token ids, int64 `[samples, length]`; those of `IGNORED` do not count.

    Raises:
        BatchError: If there are no logits, or labels of another shape or beyond the vocabulary.

    Examples:
        >>> loss, tokens = next_token_loss([torch.zeros(1, 3, 8)], torch.tensor([[5, 1, 2]]))
        >>> round(math.exp(loss / tokens), 4), tokens
        (8.0, 2)
    """
    if not outputs or outputs[0].dim() != 3:
        raise BatchError(
            "perplexity needs logits of shape [samples, length, vocabulary] as the model's first "
            f"output; found {_shape_of(outputs)}"
        )
    logits = outputs[0]
    if labels.shape != logits.shape[:2]:
        raise BatchError(
            f"there are labels of shape {list(labels.shape)} for logits of shape "
            f"{list(logits.shape)}; perplexity takes a token id for each position"
        )
    counted = labels[:, 1:][labels[:, 1:] != IGNORED]
    _check_range("token ids", counted, "tokens", logits.shape[2])
    flat = logits[:, :-1].flatten(0, 1).float()
    loss = functional.cross_entropy(
        flat, labels[:, 1:].flatten(), reduction="sum", ignore_index=IGNORED
    )
    return float(loss), len(counted)


def perplexity(loss: float) -> float:
    """The perplexity `exp(loss)` of a mean loss in nats; `inf` where that is beyond a float.

    Examples:
        >>> round(perplexity(math.log(8.0)), 6), perplexity(710.0)
        (8.0, inf)
    """
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def _relative(value: float, base: float) -> str:
    """How far a figure is from float's; of two that are both infinite, not at all."""
    return change(0.0 if value == base else value / base - 1)


METRICS: Mapping[str, Metric] = {
    "accuracy": Metric(
        "accuracy",
        count_right,
        finish=lambda mean: mean,
        text=percent,
        difference=lambda value, base: points(value - base),
        heading="points",
        unit=" points",
        short="accuracy",
    ),
    "perplexity": Metric(
        "perplexity",
        next_token_loss,
        finish=perplexity,
        text=lambda value, digits: f"{value:.{digits}f}",
        difference=_relative,
        heading="change",
        unit="",
        short="ppl.",
    ),
}
"""What a report can measure on test data, by name."""


def _powers(expected: Sequence[Tensor], actual: Sequence[Tensor]) -> tuple[float, float]:
    """Sums of squares of the signal and of the noise."""
    if [tensor.shape for tensor in expected] != [tensor.shape for tensor in actual]:
        raise BatchError(
            "the reference's outputs and the model's differ in number or shape: "
            f"{_shapes(expected)} against {_shapes(actual)}; run both on the same batches"
        )
    signal = sum(float(tensor.double().square().sum()) for tensor in expected)
    pairs = zip(expected, actual, strict=True)
    noise = sum(float((one.double() - other.double()).square().sum()) for one, other in pairs)
    return signal, noise


def _decibels(signal: float, noise: float) -> float:
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf


def _check_range(what: str, labels: Tensor, entries: str, count: int) -> None:
    if len(labels) and (int(labels.min()) < 0 or int(labels.max()) >= count):
        raise BatchError(
            f"{what} go from {int(labels.min())} to {int(labels.max())}, but the model has "
            f"{count} {entries}, 0 to {count - 1}"
        )


def _shape_of(outputs: Sequence[Tensor]) -> str:
    return str(list(outputs[0].shape)) if outputs else "no floating-point output"


def _shapes(tensors: Sequence[Tensor]) -> str:
    listed = ", ".join(str(list(tensor.shape)) for tensor in tensors[:3])
    return f"{len(tensors)} tensors ({listed}{', ...' if len(tensors) > 3 else ''})"
