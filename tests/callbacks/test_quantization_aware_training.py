from __future__ import annotations

import copy
import json
import os
import runpy
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from torch import nn

import fxmpq
from fxmpq.callbacks import QuantizationAwareTraining
from fxmpq.errors import FxmpqError
from fxmpq.graph.integer_biases import round_biases
from fxmpq.graph.state import state_of
from fxmpq.quantizers.planned import PlannedQuantizer
from fxmpq.training.distillation import divergence
from fxmpq.training.planned import trainable_plan

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
SCRIPT = Path(__file__).with_name("two_ranks_training.py")


def _adam(module: Any) -> torch.optim.Optimizer:
    """Of the network alone, whatever it is by then."""
    return torch.optim.Adam(module.model.parameters(), 1e-3)


def test_the_modules_own_step_and_optimizer_train_the_planned_graph(
    make_trainer: MakeTrainer, classifier: Any, blobs: Any, graph: Any, plan: Any
) -> None:
    """The reference trains the trainable graph without the callback, step by step."""
    twin, network = copy.deepcopy(classifier), classifier.model
    twin.model = trainable_plan(fxmpq.apply(graph, plan)).train()
    fit(make_trainer, twin, blobs)
    callback = QuantizationAwareTraining(graph, plan)
    fit(make_trainer, classifier, blobs, callback)

    assert classifier.model is callback.graph_module
    assert callback.float_module is network
    assert torch.equal(outputs(classifier.model, blobs), outputs(twin.model, blobs))
    assert not torch.equal(
        outputs(classifier.model, blobs), outputs(fxmpq.apply(graph, plan), blobs)
    )
    assert state_of(callback.graph_module).choices == plan
    assert not any(isinstance(each, PlannedQuantizer) for each in classifier.modules())


def test_training_lowers_the_loss_and_the_result_converts(
    make_trainer: MakeTrainer, classifier: Any, blobs: Any, graph: Any, plan: Any, by_hand: Any
) -> None:
    planned = fxmpq.apply(graph, plan)
    before = by_hand(classifier, planned, blobs.val_dataloader())
    callback = QuantizationAwareTraining(planned)
    classifier.train()
    fit(make_trainer, classifier, blobs, callback, max_epochs=6)
    after = by_hand(classifier, callback.graph_module, blobs.val_dataloader())
    assert after["loss"] < 0.9 * before["loss"]
    [found] = fxmpq.convert(callback.graph_module).run(blobs.images[:8])
    assert torch.equal(found, callback.graph_module(blobs.images[:8]))
    (seen,) = make_trainer(callbacks=[callback]).validate(classifier, blobs, verbose=False)
    assert seen == pytest.approx(after, rel=1e-5)


def test_biases_that_the_target_adds_as_integers_are_so_in_the_result(
    make_trainer: MakeTrainer, classifier: Any, blobs: Any
) -> None:
    batch = blobs.images[:8]
    prepared = fxmpq.prepare(fxmpq.trace(classifier.model.eval(), batch), "onnxruntime")
    calibrated = fxmpq.calibrate(prepared, [batch], progress=False)
    plan = {group.name: "w4a8" for group in state_of(calibrated).groups}
    callback = QuantizationAwareTraining(calibrated, plan)
    fit(make_trainer, classifier.train(), blobs, callback, max_epochs=1)
    found = callback.graph_module
    again = copy.deepcopy(found)
    round_biases(again)
    assert torch.equal(again(batch), found(batch))
    roundings = [name for name in found.state_dict() if name.endswith(".rounding")]
    assert len(roundings) == 2


def test_the_graph_and_the_float_network_stay_as_they_were(
    make_trainer: MakeTrainer, classifier: Any, blobs: Any, graph: Any, plan: Any
) -> None:
    network = classifier.model
    weights = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    inside = {name: tensor.clone() for name, tensor in graph.state_dict().items()}
    fit(make_trainer, classifier, blobs, QuantizationAwareTraining(graph, plan, distillation=0.5))
    for kept, now in ((weights, network.state_dict()), (inside, graph.state_dict())):
        assert all(torch.equal(tensor, now[name]) for name, tensor in kept.items())


def test_steps_are_clamped_after_each_batch(
    make_trainer: MakeTrainer, classifier: Any, blobs: Any, graph: Any, plan: Any
) -> None:
    class Watches(Callback):
        smallest = 1.0

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            ratios = [m.ratio for m in pl_module.modules() if isinstance(m, PlannedQuantizer)]
            self.smallest = min(self.smallest, *(float(ratio.detach().min()) for ratio in ratios))
            with torch.no_grad():
                for ratio in ratios:
                    ratio.fill_(-1.0)

    watches = Watches()
    classifier.configure_optimizers = lambda: torch.optim.SGD(classifier.parameters(), 0.0)
    fit(make_trainer, classifier, blobs, QuantizationAwareTraining(graph, plan), watches)
    assert watches.smallest == pytest.approx(1e-3)


def test_distillation_holds_it_to_the_float_model_without_reading_labels(
    make_trainer: MakeTrainer, classifier: Any, blobs: Any, graph: Any, plan: Any
) -> None:
    with torch.no_grad():
        inputs = copy.deepcopy(classifier.norm).train()(blobs.images[: blobs.samples])
    results = []
    for shift in (0, 1):
        module, data = copy.deepcopy(classifier), copy.deepcopy(blobs)
        data.labels = (data.labels + shift) % 4
        module.configure_optimizers = partial(_adam, module)
        callback = QuantizationAwareTraining(graph, plan, distillation=1)
        fit(make_trainer, module, data, callback)
        results.append(callback.graph_module)
    assert torch.equal(*(outputs(found, blobs) for found in results))
    with torch.no_grad():
        before, after = (
            float(divergence(graph(inputs), network(inputs)))
            for network in (fxmpq.apply(graph, plan), results[0])
        )
    assert after < 0.7 * before


@pytest.mark.parametrize("fails", [False, True])
def test_the_training_step_is_the_modules_own_afterwards(
    make_trainer: MakeTrainer, classifier: Any, blobs: Any, graph: Any, plan: Any, fails: bool
) -> None:
    callback = QuantizationAwareTraining(graph, plan, distillation=0.5)
    if fails:
        with pytest.raises(KilledError):
            fit(make_trainer, classifier, blobs, callback, StopsAfter(1))
    else:
        fit(make_trainer, classifier, blobs, callback)
    assert "training_step" not in vars(classifier)
    assert not classifier.model._forward_hooks
    if fails:
        with pytest.raises(FxmpqError, match="nothing is trained yet"):
            _ = callback.graph_module


def test_a_graph_that_another_callback_left_is_trained(
    make_trainer: MakeTrainer, classifier: Any, blobs: Any, low_bits: Any
) -> None:
    quantizing = low_bits()
    make_trainer(callbacks=[quantizing]).validate(classifier, blobs, verbose=False)
    assert classifier.model is quantizing.graph_module
    callback = QuantizationAwareTraining(quantizing.graph_module)
    fit(make_trainer, classifier, blobs, callback)
    assert callback.float_module is quantizing.graph_module
    assert classifier.model is callback.graph_module
    assert state_of(classifier.model).choices == quantizing.plan.choices


@pytest.mark.parametrize("distillation", [-1, 1.5, "all"])
def test_a_share_that_is_none_is_refused_at_once(graph: Any, plan: Any, distillation: Any) -> None:
    with pytest.raises(FxmpqError, match="number from 0"):
        QuantizationAwareTraining(graph, plan, distillation=distillation)


def test_a_graph_without_a_plan_is_refused_at_once(graph: Any, classifier: Any) -> None:
    with pytest.raises(FxmpqError, match="no plan to train"):
        QuantizationAwareTraining(graph)
    with pytest.raises(FxmpqError, match="no plan for|no precision for|no group"):
        QuantizationAwareTraining(graph, {"nonsense": "w2a8"})
    with pytest.raises(FxmpqError, match="expected a graph"):
        QuantizationAwareTraining(classifier.model)


def test_unusable_modules_are_refused_in_setup(
    make_trainer: MakeTrainer, classifier: Any, blobs: Any, graph: Any, plan: Any
) -> None:
    def refused(message: str, **options: Any) -> None:
        network = classifier.model
        callback = QuantizationAwareTraining(graph, plan, **options)
        with pytest.raises(MisconfigurationException, match=message):
            fit(make_trainer, classifier, blobs, callback)
        assert classifier.model is network

    refused("no sub-module 'modle'.*closest: 'model'", attribute="modle")
    refused("no sub-module ''", attribute="")
    refused("traced from another network", attribute="norm")
    classifier.automatic_optimization = False
    refused("optimizes by hand", distillation=0.5)
    classifier.automatic_optimization = True
    classifier.model = nn.Sequential(nn.Conv2d(1, 9, 3), *[nn.Identity()] * 5, nn.Flatten())
    refused(r"its weight '0.weight' has shape \[8, 1, 3, 3\], there it has \[9, 1, 3, 3\]")


def test_two_processes_end_with_the_same_graph_and_with_that_of_one(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    process = subprocess.run(
        [sys.executable, str(SCRIPT), str(two)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    runpy.run_path(str(SCRIPT))["run"](one, 1)
    single = json.loads((one / "rank0.json").read_text())
    first, second = (json.loads((two / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert first["trained"] == second["trained"]
    trained, begun = (torch.tensor(first[name]) for name in ("trained", "begun"))
    # The same batches of eight, but their gradients are added up in another order.
    torch.testing.assert_close(trained, torch.tensor(single["trained"]), rtol=0, atol=1e-5)
    assert float((trained - begun).abs().max()) > 0.1
