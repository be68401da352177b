"""Labels from the LightningModule's steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from fxmpq.callbacks import MixedPrecisionCallback
from fxmpq.callbacks.labels import step_batches, with_step_losses
from fxmpq.errors import FxmpqError
from fxmpq.training.loss import StepLoss


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


class Normalised(LightningModule):
    """Its batches are what a hook makes of them on the device."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> dict[str, Any]:
        return {"x": batch[0] / 2, "y": batch[1]}


def test_batches_pass_through_the_hooks_of_the_module(make_trainer: Callable[..., Trainer]) -> None:
    """As in a run; what the loader gave is not changed."""
    trainer, module = make_trainer(), Normalised()
    trainer.strategy.connect(module)
    batch = [torch.ones(2), torch.tensor([0, 1])]
    (found,) = step_batches(trainer, [batch])
    assert torch.equal(found["x"], torch.full((2,), 0.5))
    found["y"].fill_(5)
    assert torch.equal(batch[0], torch.ones(2))
    assert batch[1].tolist() == [0, 1]


class DictClassifier(LightningModule):
    """Steps take what `on_after_batch_transfer` returns, and more arguments by name."""

    def __init__(self) -> None:
        super().__init__()
        self.model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 4))

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> dict[str, Any]:
        return {"x": batch[0], "y": batch[1]}

    def training_step(self, batch: dict[str, Any], batch_idx: int, **_more: Any) -> Any:
        return torch.nn.functional.cross_entropy(self.model(batch["x"]), batch["y"])

    validation_step = training_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01)


@pytest.mark.parametrize("method", ["hessian", "finetune", "learned_scales"])
def test_methods_with_a_loss_run_inside_a_run(
    method: str,
    blobs: Any,
    make_trainer: Callable[..., Trainer],
    low_bits: Callable[..., MixedPrecisionCallback],
) -> None:
    """A training inside `validate` leaves the module, its Trainer and random numbers alone."""
    module = DictClassifier()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    calibration = list(blobs.train_dataloader())
    callback = low_bits(method=method, calibration=calibration)
    trainer = make_trainer(callbacks=[callback])
    states = []
    for run in (make_trainer(), trainer):
        torch.manual_seed(3)
        run.validate(module, blobs.val_dataloader(), verbose=False)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
    assert callback.quantized.sensitivity.method == method
    assert module.trainer is trainer
    for name, tensor in callback.float_module.state_dict().items():
        assert torch.equal(tensor, before[f"model.{name}"])
