"""Distillation inside a LightningModule's own training step."""

from __future__ import annotations

import functools
from collections.abc import Mapping

from lightning.pytorch import LightningModule
from torch import Tensor

from fxmpq.errors import FxmpqError
from fxmpq.training.distillation import Distillation

_STEP = "training_step"


class DistilledStep:
    """Wraps a module's `training_step` so that its loss is mixed with a teacher's, and back.

    The step may return a tensor, a mapping with the entry `loss`, or `None` to skip the batch;
    with a distillation of weight 1 what it returns is not read, and a batch is never skipped.

    Args:
        distillation: Of the network that the step calls.

    Examples:
        >>> import torch
        >>> from fxmpq.graph.trace import trace
        >>> class Module(LightningModule):
        ...     def training_step(self, batch, batch_idx):
        ...         return self.model(batch).sum()
        >>> module, batch = Module(), torch.zeros(1, 2)
        >>> teacher = torch.nn.Linear(2, 2)
        >>> module.model = trace(teacher, batch)
        >>> step = DistilledStep(Distillation(module.model, teacher, 1.0))
        >>> step.put_on(module)
        >>> float(module.training_step(batch, 0).detach())
        0.0
        >>> step.take_off()
        >>> "training_step" in vars(module)
        False
    """

    def __init__(self, distillation: Distillation) -> None:
        self._distillation = distillation
        self._module: LightningModule | None = None
        self._hidden: dict[str, object] = {}

    def put_on(self, module: LightningModule) -> None:
        """Wrap the step of this module from now on."""
        self.take_off()
        step = module.training_step

        @functools.wraps(step)
        def training_step(*args: object, **kwargs: object) -> object:
            with self._distillation.listening():
                return self._mixed(step(*args, **kwargs))

        attributes = vars(module)
        self._hidden = {_STEP: attributes[_STEP]} if _STEP in attributes else {}
        attributes[_STEP] = training_step
        self._module = module

    def take_off(self) -> None:
        """Give the module its own step back, if it is wrapped."""
        if self._module is not None:
            del vars(self._module)[_STEP]
            vars(self._module).update(self._hidden)
            self._module = None

    def _mixed(self, result: object) -> object:
        if isinstance(result, Mapping):
            return {**result, "loss": self._mixed(result.get("loss"))}
        if result is None and self._distillation.needs_task:
            return None
        if result is not None and not isinstance(result, Tensor):
            raise FxmpqError(
                f"training_step returned {type(result).__name__}; distillation takes a tensor, a "
                "mapping with the entry 'loss', or None"
            )
        return self._distillation.mixed(result)
