from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from fxmpq.callbacks.capture import capture_batches, undisturbed
from fxmpq.graph.batches import Batch

MakeTrainer = Callable[..., Trainer]


class Net(nn.Module):
    """Takes a mask and options besides its input; refuses to run."""

    def forward(self, x: Tensor, mask: Tensor | None = None, **options: object) -> Tensor:
        raise AssertionError("the sub-module must not run")


class Gather(nn.Module):
    """Takes any number of tensors."""

    def forward(self, *tensors: Tensor, scale: float = 1.0) -> Tensor:
        return torch.stack(tensors).sum(dim=0) * scale


class Calling(LightningModule):
    """A module whose validation step is the function it is given."""

    def __init__(self, step: Callable[[Any, Any], object], model: nn.Module | None = None) -> None:
        super().__init__()
        self.model = Net() if model is None else model
        self.idle = nn.Linear(1, 1)
        self._step = step

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._step(self, batch)
        raise AssertionError("the step must not go on")


def capture(
    make_trainer: MakeTrainer,
    module: LightningModule,
    *batches: object,
    fn: TrainerFn = TrainerFn.VALIDATING,
    path: str = "model",
) -> list[Batch]:
    trainer = make_trainer()
    trainer.state.fn = fn
    trainer.strategy.connect(module)
    with undisturbed(module):
        return capture_batches(trainer, module, path, batches)


def test_positional_arguments_are_captured_as_a_tuple(make_trainer: MakeTrainer) -> None:
    x = torch.randn(2, 3)
    (found,) = capture(make_trainer, Calling(lambda m, batch: m.model(batch, None)), x)
    assert isinstance(found, tuple)
    assert torch.equal(found[0], x)
    assert found[1] is None


def test_keywords_of_a_batch_with_labels_are_captured_as_a_mapping(
    make_trainer: MakeTrainer,
) -> None:
    batch = {"x": torch.randn(2, 3), "mask": torch.ones(2), "labels": torch.tensor([0, 1])}
    for step in (lambda m, b: m.model(**b), lambda m, b: m.model(**b, return_dict=True)):
        found = capture(make_trainer, Calling(step), batch)[0]
        assert isinstance(found, dict)
        assert list(found)[:3] == ["x", "mask", "labels"]
        assert all(torch.equal(found[name], batch[name]) for name in batch)
        assert found.get("return_dict", True) is True


def test_a_call_with_both_kinds_is_written_with_keywords(make_trainer: MakeTrainer) -> None:
    module = Calling(lambda m, batch: m.model(batch["x"], mask=batch["mask"], depth=3))
    found = capture(make_trainer, module, {"x": torch.zeros(1), "mask": torch.ones(1)})[0]
    assert found == {"x": torch.zeros(1), "mask": torch.ones(1), "depth": 3}


def test_arguments_without_names_are_refused_beside_keywords(make_trainer: MakeTrainer) -> None:
    module = Calling(lambda m, batch: m.model(batch, batch, scale=2.0), Gather())
    with pytest.raises(MisconfigurationException, match=r"'tensors' of Gather\.forward"):
        capture(make_trainer, module, torch.ones(2))


def test_captured_tensors_are_plain_copies(make_trainer: MakeTrainer) -> None:
    weight = torch.ones(3, requires_grad=True)
    x = torch.randn(2, 3)
    with torch.inference_mode():
        (found,) = capture(make_trainer, Calling(lambda m, batch: m.model(batch * weight, x)), x)
    assert isinstance(found, tuple)
    assert not any(t.is_inference() or t.requires_grad for t in found)
    assert found[1].data_ptr() != x.data_ptr()


def test_each_batch_gives_the_first_call_of_its_step(make_trainer: MakeTrainer) -> None:
    def twice(module: Calling, batch: Tensor) -> None:
        module.model(batch)
        module.model(-batch)

    batches = [torch.full((2,), float(i)) for i in range(3)]
    found = capture(make_trainer, Calling(twice), *batches)
    assert [call[0].tolist() for call in found] == [batch.tolist() for batch in batches]


def test_a_step_that_catches_exceptions_is_left_all_the_same(make_trainer: MakeTrainer) -> None:
    def guarded(module: Calling, batch: Tensor) -> None:
        try:
            module.model(batch)
        except Exception:  # noqa: BLE001  (what some users write)
            raise AssertionError("the step went on") from None

    assert len(capture(make_trainer, Calling(guarded), torch.ones(1))) == 1


def test_logging_before_the_call_does_nothing_and_works_again_after(
    make_trainer: MakeTrainer,
) -> None:
    def logging(module: Calling, batch: Tensor) -> None:
        module.log("seen", 1.0)
        module.log_dict({"loss": 2.0})
        module.model(batch)

    module = Calling(logging)
    module.log_dict = module.log  # an attribute of the user's survives
    assert len(capture(make_trainer, module, torch.ones(1))) == 1
    assert "log" not in vars(module)
    assert vars(module)["log_dict"] == module.log


def test_no_hook_is_left_behind(make_trainer: MakeTrainer) -> None:
    module = Calling(lambda m, batch: m.model(batch))
    capture(make_trainer, module, torch.ones(1))
    assert not module.model._forward_pre_hooks
    module._step = lambda m, batch: batch["labels"]
    with pytest.raises(MisconfigurationException):
        capture(make_trainer, module, {})
    assert not module.model._forward_pre_hooks


def test_the_users_own_hooks_see_the_call_only_in_the_graph(make_trainer: MakeTrainer) -> None:
    module = Calling(lambda m, batch: m.model(batch))
    module.model.register_forward_pre_hook(lambda _m, args: (args[0] * 100,))
    (found,) = capture(make_trainer, module, torch.ones(1))
    assert found[0].item() == 1


def test_a_step_that_fails_says_what_it_takes(make_trainer: MakeTrainer) -> None:
    module = Calling(lambda m, batch: m.model(batch["image"]))
    with pytest.raises(MisconfigurationException) as error:
        capture(make_trainer, module, {"picture": torch.ones(1)})
    assert "Calling.validation_step failed on calibration batch 1" in str(error.value)
    assert "KeyError: 'image'" in str(error.value)
    assert "calibration=loader" in str(error.value)


class Idle(LightningModule):
    """Never calls its sub-module `idle`."""

    def __init__(self) -> None:
        super().__init__()
        self.idle = nn.Linear(1, 1)

    def validation_step(self, batch: Tensor) -> Tensor:
        return batch


def test_a_step_that_never_calls_the_submodule_is_refused(make_trainer: MakeTrainer) -> None:
    with pytest.raises(MisconfigurationException, match=r"Idle\.validation_step never called"):
        capture(make_trainer, Idle(), torch.ones(1), path="idle")


class Steps(LightningModule):
    """Each step hands its own name's length to the sub-module."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Net()

    def forward(self, batch: Tensor) -> Tensor:
        return self.model(batch + len("forward"))

    def validation_step(self, rows: Tensor, batch_idx: int, dataloader_idx: int) -> Tensor:
        return self.model(rows + len("validation_step") + batch_idx + dataloader_idx)

    def test_step(self, batch: Tensor) -> Tensor:
        return self.model(batch + len("test_step"))


class OnlyForward(LightningModule):
    """Has no steps of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Net()

    def forward(self, batch: Tensor) -> Tensor:
        return self.model(batch + len("forward"))


@pytest.mark.parametrize(
    ("module", "fn", "step"),
    [
        (Steps, TrainerFn.VALIDATING, "validation_step"),
        (Steps, TrainerFn.TESTING, "test_step"),
        (Steps, TrainerFn.PREDICTING, "forward"),
        (Steps, TrainerFn.FITTING, "validation_step"),
        (OnlyForward, TrainerFn.FITTING, "forward"),
    ],
)
def test_the_step_of_the_run_is_used(
    make_trainer: MakeTrainer, module: type[LightningModule], fn: TrainerFn, step: str
) -> None:
    (found,) = capture(make_trainer, module(), torch.zeros(1), fn=fn)
    assert found[0].item() == len(step)


def random_numbers() -> tuple[float, float, float]:
    return torch.rand(1).item(), float(np.random.rand()), random.random()  # noqa: NPY002


@pytest.mark.parametrize("failing", [False, True])
def test_a_block_leaves_no_trace(failing: bool) -> None:
    module = Calling(lambda m, batch: None)
    module.idle.eval()
    torch.manual_seed(7)
    np.random.seed(7)  # noqa: NPY002
    random.seed(7)
    expected = random_numbers()
    torch.manual_seed(7)
    np.random.seed(7)  # noqa: NPY002
    random.seed(7)

    def block() -> None:
        with undisturbed(module):
            random_numbers()
            assert not module.training
            assert not torch.is_grad_enabled()
            assert not torch.is_inference_mode_enabled()
            if failing:
                raise KeyError("inside")

    with torch.inference_mode():
        if failing:
            with pytest.raises(KeyError, match="inside"):
                block()
        else:
            block()
        assert torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()
    assert random_numbers() == expected
    assert (module.training, module.model.training, module.idle.training) == (True, True, False)


def test_every_block_draws_the_same_numbers() -> None:
    module = Calling(lambda m, batch: None)
    drawn = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        with undisturbed(module):
            drawn.append(torch.rand(3))
    assert torch.equal(*drawn)
