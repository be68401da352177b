"""What a model's outputs are worth: accuracy against labels, SQNR against float outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torchmetrics.functional.classification import multiclass_accuracy

from fxmpq.errors import BatchError
from fxmpq.graph.batches import Batch
from fxmpq.graph.run import float_outputs
from fxmpq.targets.target import agreement_db

Run = Callable[[Batch], Sequence[object]]
"""Takes a batch as the model does and returns its flat outputs."""


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


def accuracy(outputs: Sequence[Sequence[Tensor]], labels: Tensor) -> float:
    """Share of samples whose highest logit is the label's, `mean(argmax(logits) == label)`.

    Args:
        outputs: From `collect_outputs`; the first output of each batch holds the logits,
            `[samples, classes]`.
        labels: Classes, int64 `[samples of all batches]`.

    Returns:
        A value in [0, 1].

    Raises:
        BatchError: If there are no logits, or another number of labels than of samples, or a
            label beyond the model's classes.

    Examples:
        >>> logits = torch.tensor([[2.0, 1.0], [0.0, 3.0], [5.0, 4.0]])
        >>> round(accuracy([[logits]], torch.tensor([0, 1, 1])), 4)
        0.6667
    """
    first = [batch[0] for batch in outputs if batch]
    if not first or any(logits.dim() != 2 for logits in first):
        found = [tuple(logits.shape) for logits in first[:1]] or "no floating-point output"
        raise BatchError(
            f"accuracy needs logits of shape [samples, classes] as the model's first output; "
            f"found {found}"
        )
    logits = torch.cat(first)
    if len(labels) != len(logits):
        raise BatchError(f"there are {len(labels)} labels for {len(logits)} samples")
    classes = logits.shape[1]
    if int(labels.min()) < 0 or int(labels.max()) >= classes:
        raise BatchError(
            f"labels go from {int(labels.min())} to {int(labels.max())}, but the model has "
            f"{classes} classes, 0 to {classes - 1}"
        )
    return float(multiclass_accuracy(logits, labels, num_classes=classes, average="micro"))


def output_sqnr_db(
    reference: Sequence[Sequence[Tensor]], outputs: Sequence[Sequence[Tensor]]
) -> float:
    """Output SQNR, `10 log10(sum ||y||^2 / sum ||z - y||^2)` over all samples and outputs.

    Args:
        reference: Outputs `y` of the float model, from `collect_outputs`.
        outputs: Outputs `z` of the quantized one, on the same batches.

    Returns:
        Decibels; `inf` where there is no difference.

    Raises:
        BatchError: If the two were not made from the same batches.

    Examples:
        >>> round(output_sqnr_db([[torch.tensor([10.0])]], [[torch.tensor([11.0])]]), 6)
        20.0
    """
    expected = [tensor for batch in reference for tensor in batch]
    actual = [tensor for batch in outputs for tensor in batch]
    if [tensor.shape for tensor in expected] != [tensor.shape for tensor in actual]:
        raise BatchError(
            "the reference's outputs and the model's differ in number or shape: "
            f"{_shapes(expected)} against {_shapes(actual)}; run both on the same batches"
        )
    return agreement_db(expected, actual)


def _shapes(tensors: Sequence[Tensor]) -> str:
    listed = ", ".join(str(list(tensor.shape)) for tensor in tensors[:3])
    return f"{len(tensors)} tensors ({listed}{', ...' if len(tensors) > 3 else ''})"
