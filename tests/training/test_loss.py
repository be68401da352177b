"""Losses from labels."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics.classification import MulticlassAccuracy
from transformers import BatchEncoding
from transformers.modeling_outputs import SequenceClassifierOutput

from fxmpq.errors import FxmpqError
from fxmpq.identity import identity
from fxmpq.training.loss import (
    StepLoss,
    batch_samples,
    check_loss,
    check_was_run,
    classification_loss,
    divergences,
    loss_value,
    on_device,
)

BATCH = torch.arange(12.0).reshape(4, 3).sin(), torch.tensor([0, 1, 1, 0])


class Classifier(LightningModule):
    """A module with a network, a head of its own, a metric and logs."""

    def __init__(self, result: Callable[[Tensor], object] = lambda loss: loss) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(3, 5), nn.Dropout(0.5))
        self.head = nn.Sequential(nn.Dropout(0.5), nn.Linear(5, 2))
        self.accuracy = MulticlassAccuracy(2)
        self.result = result

    def training_step(self, batch: tuple[Tensor, Tensor], number: int, _more: int = 5) -> object:
        """Cross-entropy, logged; Lightning does not ask how the arguments are called."""
        logits = self.head(self.model(batch[0]))
        self.accuracy(logits, batch[1])
        self.log("accuracy", self.accuracy)
        self.log_dict({"index": float(number)})
        return self.result(functional.cross_entropy(logits, batch[1]))

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """A step that takes nothing but the batch."""
        return functional.cross_entropy(self.head(self.model(batch[0])), batch[1])

    def test_step(self, batch: object) -> None:
        """A step without a loss."""


@pytest.mark.parametrize("step", ["training_step", "validation_step"])
def test_a_step_computes_its_loss_with_another_network(step: str) -> None:
    """Compared with the loss written out; the module's own head takes part, without dropout."""
    module = Classifier().train()
    other = nn.Linear(3, 5)
    found = StepLoss(module, step=step)(other, BATCH)
    expected = functional.cross_entropy(module.head[1](other(BATCH[0])), BATCH[1])
    torch.testing.assert_close(found, expected)
    found.backward()
    assert other.weight.grad is not None
    assert other.weight.grad.abs().sum() > 0


def test_the_users_module_does_not_notice() -> None:
    """Network, training flags, metric states, parameters and their gradients stay."""
    module = Classifier().train()
    network, flags = module.model, [child.training for child in module.modules()]
    loss = StepLoss(module)
    loss(nn.Linear(3, 5), BATCH).backward()
    assert module.model is network
    assert [child.training for child in module.modules()] == flags
    assert not module.accuracy.update_called
    assert all(parameter.grad is None for parameter in module.parameters())


@pytest.mark.parametrize(
    "result", [lambda loss: {"loss": loss, "x": 1}, lambda loss: (loss, 1), lambda loss: loss[None]]
)
def test_losses_in_mappings_and_tuples(result: Callable[[Tensor], object]) -> None:
    """What Lightning takes from a training step."""
    other = nn.Linear(3, 5)
    plain = StepLoss(Classifier())(other, BATCH)
    assert StepLoss(Classifier(result))(other, BATCH) == plain


@pytest.mark.parametrize("result", [lambda _: None, lambda _: {}, lambda _: torch.zeros(3)])
def test_a_step_without_a_scalar_loss_is_an_error(result: Callable[[Tensor], object]) -> None:
    """The message names the step and the way out."""
    with pytest.raises(FxmpqError, match=r"training_step returned .*callable loss\(model, batch\)"):
        StepLoss(Classifier(result))(nn.Linear(3, 5), BATCH)


def test_networks_and_steps_that_are_not_there() -> None:
    """Refused on construction, with the closest names."""
    with pytest.raises(FxmpqError, match="no sub-module 'modle'; closest: 'model'"):
        StepLoss(Classifier(), "modle")
    with pytest.raises(FxmpqError, match="no 'fit_step'"):
        StepLoss(Classifier(), step="fit_step")


def test_a_module_that_cannot_be_copied() -> None:
    """The message says what to give instead."""
    module = Classifier()
    module.lock = threading.Lock()
    with pytest.raises(FxmpqError, match=r"cannot be copied.*callable loss"):
        StepLoss(module)


def test_samples_of_a_batch() -> None:
    """The first tensor with a dimension counts, however deep it lies."""
    assert batch_samples((torch.tensor(1.0), [{"x": torch.zeros(7, 2)}])) == 7
    assert batch_samples([1, "a"]) == 1


class _Keywords(nn.Module):
    def forward(self, *, x: Tensor, scale: Tensor) -> SequenceClassifierOutput:
        """Logits inside an output class."""
        return SequenceClassifierOutput(logits=x * scale)


def test_classification_loss_calls_models_as_they_want() -> None:
    """Tensors, tuples and keywords; the same cross-entropy."""
    x, labels = BATCH[0][:, :2], BATCH[1]
    expected = functional.cross_entropy(2 * x, labels)
    keywords = {"x": x, "scale": torch.tensor(2.0)}
    assert classification_loss(_Keywords(), (keywords, labels)) == expected
    assert classification_loss(nn.Identity(), (2 * x, labels)) == expected
    assert classification_loss(nn.Bilinear(2, 2, 2), ((x, x), labels)).isfinite()


def test_classification_loss_refuses_what_it_cannot_read() -> None:
    """Unlabelled batches, and models without logits."""
    with pytest.raises(FxmpqError, match=r"\(inputs, labels\); found Tensor"):
        classification_loss(nn.Identity(), BATCH[0])
    with pytest.raises(FxmpqError, match="no floating-point output"):
        classification_loss(nn.Identity(), (BATCH[1], BATCH[1]))


def test_only_scalars_are_losses() -> None:
    """The message shows what was found."""
    assert loss_value(classification_loss, nn.Identity(), BATCH).shape == ()
    assert loss_value(lambda _model, _batch: torch.ones(1, 1), nn.Identity(), BATCH) == 1
    with pytest.raises(FxmpqError, match=r"found a tensor of \[4, 3\]"):
        loss_value(lambda _model, batch: batch[0], nn.Identity(), BATCH)
    with pytest.raises(FxmpqError, match="found 0.5"):
        loss_value(lambda _model, _batch: 0.5, nn.Identity(), BATCH)  # type: ignore[arg-type,return-value]


def test_a_loss_must_run_the_model() -> None:
    """What it returns would say nothing about the model."""
    check_was_run(True)
    with pytest.raises(FxmpqError, match="without running the model"):
        check_was_run(False)


def test_batches_move_as_they_are_nested() -> None:
    """Tensors move, everything else stays; those made in inference mode become ordinary."""
    with torch.inference_mode():
        poisoned = torch.ones(2)
    found = on_device({"x": [poisoned, 3], "y": BATCH[0]}, torch.device("meta"))
    assert found["x"][0].device.type == "meta"
    assert found["x"][1] == 3
    own = on_device([poisoned, BATCH[0]], torch.device("cpu"))
    assert not own[0].is_inference()
    assert own[1] is BATCH[0]


def test_mappings_that_torch_does_not_know() -> None:
    """As tokenizers return: their tensors are found, and moved in a copy."""
    encoding = BatchEncoding({"ids": torch.ones(4, 2), "extra": [torch.zeros(3)]})
    with torch.inference_mode():
        inner = torch.ones(2)
    encoding["inner"] = inner
    assert batch_samples(encoding) == 4
    assert batch_samples([BatchEncoding({}), encoding]) == 4
    moved = on_device((encoding, 1), torch.device("meta"))
    assert isinstance(moved[0], BatchEncoding)
    assert moved[0]["ids"].device.type == moved[0]["extra"][0].device.type == "meta"
    assert encoding["ids"].device.type == "cpu"
    assert not on_device(encoding, torch.device("cpu"))["inner"].is_inference()
    assert encoding["inner"] is inner


class Open(nn.Module):
    """Its step takes anything besides."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Linear(3, 2)

    def training_step(
        self, batch: object, batch_idx: int, *more: object, **named: object
    ) -> Tensor:
        assert (batch_idx, more, named) == (0, (), {})
        return functional.cross_entropy(self.model(batch[0]), batch[1])


def test_a_step_is_given_no_more_than_it_insists_on() -> None:
    loss, other = StepLoss(Open()), nn.Linear(3, 2)
    expected = functional.cross_entropy(other(BATCH[0]), BATCH[1])
    assert torch.equal(loss(other, BATCH), expected)


def test_a_step_loss_is_told_by_its_module_and_step_alone() -> None:
    """Not by the network it was last called with, nor by what its metrics gathered."""
    loss, same = StepLoss(Classifier()), StepLoss(Classifier())
    loss(nn.Linear(3, 5), BATCH)
    assert identity(loss) == identity(same)
    assert identity(StepLoss(Classifier(), step="validation_step")) != identity(same)
    changed = Classifier()
    with torch.no_grad():
        changed.head[1].bias += 1
    assert identity(StepLoss(changed)) != identity(same)
    with torch.no_grad():
        changed.head[1].bias.copy_(Classifier().head[1].bias)
        changed.model[0].bias += 1
    assert identity(StepLoss(changed)) == identity(same)


@pytest.mark.parametrize("loss", [None, "cross_entropy", 3])
def test_what_is_no_loss_is_refused(loss: object) -> None:
    with pytest.raises(FxmpqError, match=r"a loss is a callable .*fxmpq.StepLoss"):
        check_loss(loss)
    check_loss(functional.cross_entropy)


def test_divergences_are_torchs_and_a_class_at_minus_infinity_has_no_share() -> None:
    generator = torch.Generator().manual_seed(0)
    reference, found = (torch.randn(4, 3, 5, generator=generator).double() for _ in range(2))
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=reference),
        torch.distributions.Categorical(logits=found),
    )
    assert torch.allclose(divergences(reference, found), expected)
    reference[..., 0] = found[..., 0] = -torch.inf
    kept = divergences(reference[..., 1:], found[..., 1:])
    assert torch.allclose(divergences(reference, found), kept)
