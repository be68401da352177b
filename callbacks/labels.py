"""Labels for the methods that read them: from the LightningModule's own steps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxmpq.sensitivity.measure import METHODS
from fxmpq.training.loss import StepLoss

STEPS = ("training_step", "validation_step")


def with_step_losses(
    method: str, options: Mapping[str, object], module: nn.Module, path: str
) -> dict[str, object]:
    """Make losses of the steps that the options name, and of `training_step` where none is named.

    Args:
        method: Sensitivity method.
        options: Its options; `loss` and `score` may be the name of a step.
        module: The LightningModule.
        path: Attribute path of its network.

    Returns:
        The options with callables in place of names.

    Raises:
        FxmpqError: If the module has no such step, or cannot be copied.
    """
    found = dict(options)
    if METHODS[method].labels:
        found.setdefault("loss", STEPS[0])
    for name in ("loss", "score"):
        value = found.get(name)
        if isinstance(value, str) and value in STEPS:
            found[name] = StepLoss(module, path, value)
    return found


def step_batches(trainer: Trainer, batches: Iterable[object]) -> list[Any]:
    """Batches as the Trainer hands them to a step: converted, moved, the module's hooks run.

    Args:
        trainer: The running Trainer.
        batches: What the module's loaders yield.

    Returns:
        Tensors are copies on the CPU.
    """
    convert, place = trainer.precision_plugin.convert_input, trainer.strategy.batch_to_device
    placed = [place(convert(batch)) for batch in batches]
    return [
        pytree.tree_map_only(Tensor, lambda t: t.detach().to("cpu", copy=True), batch)
        for batch in placed
    ]
