"""Distillation: a loss that holds a network in training to the logits of its float model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, fx, nn

from fxmpq.errors import FxmpqError
from fxmpq.graph.batches import graph_device
from fxmpq.graph.run import float_outputs
from fxmpq.training.loss import check_was_run, divergences


class Distillation:
    """Mixes a task's loss with the divergence from a teacher's logits.

    The mixed loss is

        (1 - weight) * task + weight * KL(teacher || student)
        KL(t || s) = mean over samples of sum_k softmax(t)_k (log softmax(t)_k - log softmax(s)_k)

    in nats, of the first floating-point output, over its last dimension. The teacher is called
    with what the student is called with while `listening`, without gradients. With weight 1 the
    task's loss is not read, so it may be `None` and no labels are needed.

    Cost: one float forward pass of the teacher for each pass of the student.

    Args:
        student: The network in training.
        teacher: What it is held to, called like the student; moved to the student's device.
        weight: Share of the divergence in the mixed loss, 0 to 1.

    Raises:
        FxmpqError: If the weight is no such number.

    Examples:
        >>> from fxmpq.graph.trace import trace
        >>> batch = torch.tensor([[0.0, 1.0]])
        >>> teacher = nn.Linear(2, 2)
        >>> student = trace(teacher, batch)
        >>> distillation = Distillation(student, teacher, 0.5)
        >>> with distillation.listening():
        ...     _ = student(batch)
        ...     float(distillation.mixed(torch.tensor(3.0)).detach())
        1.5
    """

    def __init__(self, student: fx.GraphModule, teacher: nn.Module, weight: float) -> None:
        check_distillation(weight)
        self._student = student
        self._teacher = teacher
        self._weight = float(weight)
        self._terms: list[Tensor] = []

    @property
    def needs_task(self) -> bool:
        """Whether the task's loss has a share."""
        return self._weight < 1

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Compare every call of the student inside the block with the teacher's answer.

        The student's hook is gone afterwards, whatever happens.
        """
        self._terms = []
        self._teacher.to(graph_device(self._student))
        handle = self._student.register_forward_hook(self._compare, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()
            self._terms = []

    def mixed(self, task: Tensor | None) -> Tensor:
        """The mixed loss of the calls since `listening` began, a scalar.

        Args:
            task: The task's loss; read unless the weight is 1.

        Raises:
            FxmpqError: If the student was not called.
        """
        check_was_run(bool(self._terms))
        divergence = torch.stack(self._terms).mean()
        if not self.needs_task:
            return divergence
        assert task is not None
        return (1 - self._weight) * task + self._weight * divergence

    def _compare(
        self,
        _: nn.Module,
        args: tuple[object, ...],
        kwargs: dict[str, object],
        outputs: object,
    ) -> None:
        with torch.no_grad():
            expected = self._teacher(*args, **kwargs)
        self._terms.append(divergence(_logits(expected), _logits(outputs)))


def divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """Mean Kullback-Leibler divergence of a student's softmax from its teacher's, in nats.

    Args:
        teacher: Logits `[..., classes]`; a class at minus infinity has no share.
        student: Logits of the same shape, with gradients.

    Returns:
        Shape `[]`: the mean over all but the last dimension.

    Examples:
        >>> logits = torch.tensor([[0.0, 0.0]])
        >>> round(float(divergence(logits, torch.tensor([[0.0, 1.0]]))), 4)
        0.1201
    """
    return divergences(teacher.float(), student.float()).mean()


def check_distillation(weight: float) -> None:
    """Refuse a share that is none.

    Raises:
        FxmpqError: With the legal range.
    """
    is_number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
    if not (is_number and math.isfinite(weight) and 0 <= weight <= 1):
        raise FxmpqError(
            f"distillation is {weight!r}; it is the share of the divergence from the float "
            "model's logits in the loss, a number from 0 (labels only) to 1 (no labels)"
        )


def _logits(outputs: object) -> Tensor:
    found = float_outputs(outputs)
    if not found or found[0].dim() < 2 or found[0].shape[-1] < 2:
        shape = f"of shape {list(found[0].shape)}" if found else "missing"
        raise FxmpqError(
            "distillation reads the model's first floating-point output as logits, [samples, "
            f"classes] with two or more classes; it is {shape}. Train with distillation=0"
        )
    return found[0]
