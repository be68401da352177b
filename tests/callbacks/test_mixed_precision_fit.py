from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from fxmpq.callbacks import MixedPrecisionCallback
from fxmpq.graph.state import state_of

from .conftest import QUIET_TRAINER

pytestmark = QUIET_TRAINER
MakeTrainer = Callable[..., Trainer]
LowBits = Callable[..., MixedPrecisionCallback]
ByHand = Callable[..., dict[str, float]]
Equal = Callable[[nn.Module, nn.Module], bool]


class SeesMetrics(Callback):
    """Keeps what each validation of a fit logs."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seen.append({name: value.item() for name, value in trainer.callback_metrics.items()})


def fit(make_trainer: MakeTrainer, module: Any, data: Any, *callbacks: Callback) -> list[Any]:
    torch.manual_seed(1)
    metrics = SeesMetrics()
    trainer = make_trainer(max_epochs=2, callbacks=[metrics, *callbacks])
    trainer.fit(module, datamodule=data)
    return metrics.seen


def test_training_is_not_disturbed_and_its_result_is_quantized(
    equal: Equal,
    by_hand: ByHand,
    low_bits: LowBits,
    make_trainer: MakeTrainer,
    classifier: Any,
    blobs: Any,
) -> None:
    twin = copy.deepcopy(classifier)
    expected = fit(make_trainer, twin, blobs)
    callback = low_bits()
    assert fit(make_trainer, classifier, blobs, callback) == expected

    graph = callback.graph_module
    assert classifier.model is graph
    assert equal(callback.float_module, twin.model)
    assert equal(classifier.norm, twin.norm)
    assert state_of(graph).fingerprint == callback.plan.fingerprint
    (found,) = make_trainer().validate(classifier, blobs, verbose=False)
    assert found == pytest.approx(by_hand(classifier, graph, blobs.val_dataloader()), rel=1e-5)
    assert found["loss"] != expected[-1]["loss"]


def test_a_later_run_goes_on_with_the_same_graph(
    by_hand: ByHand, low_bits: LowBits, make_trainer: MakeTrainer, classifier: Any, blobs: Any
) -> None:
    callback = low_bits()
    make_trainer(callbacks=[callback]).validate(classifier, blobs, verbose=False)
    graph, flags = callback.graph_module, [m.training for m in callback.float_module.modules()]
    trainer = make_trainer(callbacks=[callback])
    (found,) = trainer.test(classifier, blobs.test_dataloader(), verbose=False)
    assert callback.graph_module is graph is classifier.model
    assert found == pytest.approx(by_hand(classifier, graph, blobs.test_dataloader()), rel=1e-5)
    assert [m.training for m in callback.float_module.modules()] == flags


def test_another_module_is_quantized_anew(
    low_bits: LowBits, make_trainer: MakeTrainer, classifier: Any, blobs: Any
) -> None:
    callback, other = low_bits(), copy.deepcopy(classifier)
    other.model[0].weight.data.mul_(2)
    trainer = make_trainer(callbacks=[callback])
    trainer.validate(classifier, blobs, verbose=False)
    first = callback.plan.fingerprint
    trainer.validate(other, blobs, verbose=False)
    assert callback.plan.fingerprint != first
    assert other.model is callback.graph_module is not classifier.model


def test_training_after_a_validation_trains_the_float_network(
    equal: Equal, low_bits: LowBits, make_trainer: MakeTrainer, classifier: Any, blobs: Any
) -> None:
    twin = copy.deepcopy(classifier)
    expected = fit(make_trainer, twin, blobs)
    callback = low_bits()
    make_trainer(callbacks=[callback]).validate(classifier, blobs, verbose=False)
    before = callback.plan.fingerprint
    assert fit(make_trainer, classifier, blobs, callback) == expected
    assert equal(callback.float_module, twin.model)
    assert callback.plan.fingerprint != before
    assert classifier.model is callback.graph_module


def test_checkpoints_hold_the_float_network_and_restore_into_it(
    equal: Equal,
    by_hand: ByHand,
    low_bits: LowBits,
    make_trainer: MakeTrainer,
    classifier: Any,
    blobs: Any,
    tmp_path: Path,
) -> None:
    callback = low_bits()
    saver = ModelCheckpoint(tmp_path / "saved", monitor="loss", mode="max")
    trainer = make_trainer(max_epochs=2, enable_checkpointing=True, callbacks=[callback, saver])
    trainer.fit(classifier, datamodule=blobs)
    last = callback.plan.fingerprint
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    saved = torch.load(tmp_path / "after.ckpt", weights_only=True)["state_dict"]
    fresh = type(classifier)()
    fresh.load_state_dict(saved)
    assert equal(fresh.model, callback.float_module)
    assert equal(fresh.norm, classifier.norm)

    # The checkpoint with the largest loss, that of the first epoch, has other weights.
    (found,) = trainer.test(classifier, datamodule=blobs, ckpt_path="best", verbose=False)
    assert callback.plan.fingerprint != last
    assert classifier.model is callback.graph_module
    by_graph = by_hand(classifier, callback.graph_module, blobs.test_dataloader())
    assert found == pytest.approx(by_graph, rel=1e-5)


def test_a_second_callback_asks_for_the_float_network(
    low_bits: LowBits, make_trainer: MakeTrainer, classifier: Any, blobs: Any
) -> None:
    first, second = low_bits(), low_bits(budget="weights=90%")
    make_trainer(callbacks=[first]).validate(classifier, blobs, verbose=False)
    with pytest.raises(MisconfigurationException, match="is a quantized graph already"):
        make_trainer(callbacks=[second]).validate(classifier, blobs, verbose=False)
    classifier.model = first.float_module
    make_trainer(callbacks=[second]).validate(classifier, blobs, verbose=False)
    assert second.plan.fingerprint == first.plan.fingerprint


def test_setup_refuses_training_without_calibration_data_also_after_a_validation(
    low_bits: LowBits, make_trainer: MakeTrainer, classifier: Any, blobs: Any
) -> None:
    callback = low_bits()
    for _ in range(2):
        trainer = make_trainer(max_epochs=1, callbacks=[callback])
        with pytest.raises(MisconfigurationException, match="no calibration batches"):
            trainer.fit(classifier, blobs.train_dataloader(), blobs.val_dataloader())
        make_trainer(callbacks=[callback]).validate(classifier, blobs, verbose=False)
