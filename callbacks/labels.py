"""Labels for the methods that read them: from the LightningModule's own steps."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from fxmpq.sensitivity.measure import METHODS
from fxmpq.training.loss import StepLoss

STEPS = ("training_step", "validation_step")
# Scores that compare outputs with the float network's; all others read the module's batches.
LABEL_FREE = ("noise", "kl")


def reads_labels(method: str, options: Mapping[str, object]) -> bool:
    """Whether a method with these options takes the module's own batches, labels included.

    Args:
        method: Sensitivity method.
        options: Its options.

    Examples:
        >>> reads_labels("sqnr", {}), reads_labels("sqnr", {"score": "validation_step"})
        (False, True)
    """
    score = options.get("score", LABEL_FREE[0])
    by_score = not (isinstance(score, str) and score in LABEL_FREE)
    return METHODS[method].labels or "loss" in options or by_score


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
