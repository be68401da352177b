"""Labels from the LightningModule's steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from fxmpq.callbacks import MixedPrecisionCallback
from fxmpq.callbacks.labels import reads_labels, with_step_losses
from fxmpq.errors import FxmpqError
from fxmpq.training.loss import StepLoss


def test_which_methods_read_labels() -> None:
    """Those that need a loss, and those that are given one."""
    assert not reads_labels("projected", {"probes": 2})
    assert not reads_labels("sqnr", {"score": "kl"})
    assert reads_labels("sqnr", {"score": torch.nn.functional.cross_entropy})
    assert reads_labels("hessian", {})


def test_steps_become_losses(classifier: LightningModule) -> None:
    """By name, and `training_step` where a loss is needed and none is named."""
    found = with_step_losses("hessian", {"probes": 2}, classifier, "model")
    assert isinstance(found["loss"], StepLoss)
    assert found["probes"] == 2
    named = with_step_losses("sqnr", {"score": "training_step"}, classifier, "model")
    assert isinstance(named["score"], StepLoss)
    assert with_step_losses("sqnr", {"score": "kl"}, classifier, "model") == {"score": "kl"}


def test_a_module_without_the_step_is_an_error() -> None:
    """The message names both ways out."""
    module = LightningModule()
    module.model = torch.nn.Linear(2, 2)
    module.training_step = None  # type: ignore[assignment]
    with pytest.raises(FxmpqError, match="no 'training_step'"):
        with_step_losses("hessian", {}, module, "model")


@pytest.mark.parametrize(
    "settings", [{"method": "hessian", "probes": 1}, {"method": "sqnr", "score": "training_step"}]
)
def test_a_callback_takes_the_loss_from_the_module(
    settings: dict[str, Any],
    classifier: LightningModule,
    blobs: Any,
    make_trainer: Callable[..., Trainer],
    low_bits: Callable[..., MixedPrecisionCallback],
) -> None:
    """A whole run; what is measured is a loss on labels, and the module's metrics see nothing."""
    callback = low_bits(**settings)
    make_trainer(callbacks=[callback]).validate(classifier, datamodule=blobs, verbose=False)
    sensitivity = callback.quantized.sensitivity
    assert sensitivity.method == settings["method"]
    assert sensitivity.unit in ("loss", "score")
    group = next(iter(sensitivity.values))
    assert len(set(sensitivity.values[group].values())) > 1
