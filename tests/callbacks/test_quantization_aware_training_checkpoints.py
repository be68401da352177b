from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from fxmpq.callbacks import QuantizationAwareTraining
from fxmpq.errors import FxmpqError

from .conftest import (
    QUIET_RESUMING,
    QUIET_TRAINER,
    KilledError,
    MakeTrainer,
    StopsAfter,
    fit,
    outputs,
)

pytestmark = [QUIET_TRAINER, QUIET_RESUMING]


@pytest.mark.parametrize("distillation", [0.0, 0.5])
@pytest.mark.parametrize("anew", [False, True], ids=["same objects", "new process"])
def test_an_interrupted_training_that_is_resumed_ends_with_the_same_bits(
    make_trainer: MakeTrainer,
    classifier: Any,
    blobs: Any,
    graph: Any,
    plan: Any,
    tmp_path: Path,
    distillation: float,
    anew: bool,
) -> None:
    def make() -> QuantizationAwareTraining:
        return QuantizationAwareTraining(graph, plan, distillation=distillation)

    class Ordered(type(blobs)):  # the order of a shuffling loader is not part of a checkpoint
        def train_dataloader(self) -> Any:
            return self._loader(slice(None, self.samples), shuffle=False)

    data, twin, fresh = Ordered(), copy.deepcopy(classifier), copy.deepcopy(classifier)
    whole = make()
    fit(make_trainer, twin, data, whole, max_epochs=3)

    def saver() -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path / "kept", save_last=True)

    first = make()
    more = {"max_epochs": 3, "enable_checkpointing": True}
    with pytest.raises(KilledError):
        fit(make_trainer, classifier, data, first, saver(), StopsAfter(2), **more)
    second, module = (make(), fresh) if anew else (first, classifier)
    more["ckpt_path"] = tmp_path / "kept" / "last.ckpt"
    fit(make_trainer, module, data, second, saver(), **more)
    assert torch.equal(outputs(second.graph_module, data), outputs(whole.graph_module, data))
    found, expected = second.graph_module.state_dict(), whole.graph_module.state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_checkpoints_of_and_after_training_are_tested_frozen(
    make_trainer: MakeTrainer,
    classifier: Any,
    blobs: Any,
    graph: Any,
    plan: Any,
    by_hand: Any,
    tmp_path: Path,
) -> None:
    fresh = copy.deepcopy(classifier)
    callback = QuantizationAwareTraining(graph, plan)
    saver = ModelCheckpoint(tmp_path / "kept", monitor="loss", mode="max")
    trainer = fit(
        make_trainer, classifier, blobs, callback, saver, enable_checkpointing=True, max_epochs=3
    )
    trained = callback.graph_module
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    # The checkpoint with the largest loss is that of an earlier epoch.
    (found,) = trainer.test(classifier, datamodule=blobs, ckpt_path="best", verbose=False)
    assert classifier.model is callback.graph_module is not trained
    expected = by_hand(classifier, callback.graph_module, blobs.test_dataloader())
    assert found == pytest.approx(expected, rel=1e-5)
    assert not torch.equal(outputs(callback.graph_module, blobs), outputs(trained, blobs))

    other = QuantizationAwareTraining(graph, plan)
    after = tmp_path / "after.ckpt"
    make_trainer(callbacks=[other]).test(fresh, blobs, ckpt_path=after, verbose=False)
    assert fresh.model is other.graph_module
    assert torch.equal(outputs(fresh.model, blobs), outputs(trained, blobs))
    assert not any(tensor.is_inference() for tensor in fresh.model.parameters())


def test_a_further_fit_goes_on_from_the_frozen_graph(
    make_trainer: MakeTrainer, classifier: Any, blobs: Any, graph: Any, plan: Any
) -> None:
    callback, network = QuantizationAwareTraining(graph, plan), classifier.model
    fit(make_trainer, classifier, blobs, callback)
    first = outputs(callback.graph_module, blobs)
    classifier.configure_optimizers = lambda: torch.optim.SGD(classifier.parameters(), 0.0)
    fit(make_trainer, classifier, blobs, callback)
    assert callback.float_module is network
    torch.testing.assert_close(outputs(callback.graph_module, blobs), first)


def test_a_finished_training_goes_on_from_its_checkpoint(
    make_trainer: MakeTrainer, classifier: Any, blobs: Any, graph: Any, plan: Any, tmp_path: Path
) -> None:
    """With more epochs than before, in the same module or in another."""
    fresh, callback = copy.deepcopy(classifier), QuantizationAwareTraining(graph, plan)
    trainer = fit(make_trainer, classifier, blobs, callback)
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    results = []
    for module, each in ((classifier, callback), (fresh, QuantizationAwareTraining(graph, plan))):
        fit(make_trainer, module, blobs, each, max_epochs=3, ckpt_path=tmp_path / "two.ckpt")
        results.append(outputs(each.graph_module, blobs))
    assert torch.equal(*results)


def test_evaluation_without_a_checkpoint_is_left_alone(
    make_trainer: MakeTrainer, classifier: Any, blobs: Any, graph: Any, plan: Any
) -> None:
    network = classifier.model
    callback = QuantizationAwareTraining(graph, plan)
    make_trainer(callbacks=[callback]).validate(classifier, blobs, verbose=False)
    assert classifier.model is network
    (first,) = make_trainer().test(classifier, blobs, verbose=False)
    fit(make_trainer, classifier, blobs, callback)
    trained = callback.graph_module
    (second,) = make_trainer(callbacks=[callback]).test(classifier, blobs, verbose=False)
    assert classifier.model is trained is callback.graph_module
    assert second != first


def test_what_cannot_be_restored_leaves_the_module_as_it_was(
    make_trainer: MakeTrainer, classifier: Any, blobs: Any, graph: Any, plan: Any, tmp_path: Path
) -> None:
    network, callback = classifier.model, QuantizationAwareTraining(graph, plan)
    with pytest.raises(FxmpqError, match="nothing is replaced yet"):
        _ = callback.float_module
    trainer = make_trainer()
    trainer.validate(classifier, blobs, verbose=False)
    trainer.save_checkpoint(tmp_path / "float.ckpt")
    with pytest.raises(RuntimeError, match=r"Missing key\(s\)"):
        make_trainer(callbacks=[callback]).test(
            classifier, blobs, ckpt_path=tmp_path / "float.ckpt", verbose=False
        )
    assert classifier.model is network
