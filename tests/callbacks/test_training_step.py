from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from fxmpq.callbacks.training_step import DistilledStep
from fxmpq.errors import FxmpqError
from fxmpq.graph.trace import trace
from fxmpq.training.distillation import Distillation, divergence

BATCH = torch.linspace(-1, 1, 12).reshape(4, 3)


class Module(LightningModule):
    """Returns from its step what it is told to."""

    def __init__(self, make: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = trace(nn.Linear(3, 2), BATCH)
        self.make = make

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        return self.make(self.model(batch).square().mean())


TEACHER = nn.Linear(3, 2)


def wrapped(module: Module, share: float) -> DistilledStep:
    step = DistilledStep(Distillation(module.model, TEACHER, share))
    step.put_on(module)
    return step


def expected(module: Module, share: float) -> Tensor:
    outputs = module.model(BATCH)
    task, term = outputs.square().mean(), divergence(TEACHER(BATCH), outputs)
    return (1 - share) * task + share * term


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_a_steps_loss_is_mixed(share: float) -> None:
    module = Module(lambda loss: loss)
    wanted = expected(module, share)
    wrapped(module, share)
    torch.testing.assert_close(module.training_step(BATCH, 0), wanted)
    assert list(inspect.signature(module.training_step).parameters) == ["batch", "batch_idx"]


def test_what_else_a_step_returns_is_kept() -> None:
    module = Module(lambda loss: {"loss": loss, "seen": 4})
    wanted = expected(module, 0.3)
    wrapped(module, 0.3)
    found = module.training_step(BATCH, 0)
    torch.testing.assert_close(found["loss"], wanted)
    assert found["seen"] == 4


@pytest.mark.parametrize("make", [lambda _: None, lambda _: {"loss": None, "seen": 4}])
def test_a_skipped_batch_is_skipped_unless_no_labels_are_needed(make: Any) -> None:
    module = Module(make)
    step = wrapped(module, 0.3)
    found = module.training_step(BATCH, 0)
    assert (found["loss"] if isinstance(found, dict) else found) is None
    step.take_off()
    wrapped(module, 1.0)
    found = module.training_step(BATCH, 0)
    found = found["loss"] if isinstance(found, dict) else found
    torch.testing.assert_close(found, expected(module, 1.0))


@pytest.mark.parametrize("make", [lambda loss: [loss], lambda _: "loss"])
def test_what_is_no_loss_is_refused(make: Any) -> None:
    module = Module(make)
    wrapped(module, 0.3)
    with pytest.raises(FxmpqError, match="distillation takes a tensor"):
        module.training_step(BATCH, 0)


def test_the_modules_own_step_is_back_afterwards() -> None:
    module = Module(lambda loss: loss)
    step = wrapped(module, 0.3)
    assert "training_step" in vars(module)
    step.take_off()
    step.take_off()
    assert "training_step" not in vars(module)
    torch.testing.assert_close(module.training_step(BATCH, 0), expected(module, 0.0))


def test_a_step_that_was_set_on_the_module_itself_is_back_too() -> None:
    module = Module(lambda loss: loss)

    def own(batch: Tensor, batch_idx: int) -> Tensor:
        return module.model(batch).sum() * 0 + 7

    vars(module)["training_step"] = own
    step = wrapped(module, 0.25)
    term = divergence(TEACHER(BATCH), module.model(BATCH))
    torch.testing.assert_close(module.training_step(BATCH, 0), 0.75 * 7 + 0.25 * term)
    step.take_off()
    assert module.training_step is own
