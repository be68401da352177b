from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import nn

import fxmpq
from fxmpq.callbacks import MixedPrecisionCallback
from fxmpq.graph.state import state_of

from .conftest import QUIET_TRAINER

pytestmark = QUIET_TRAINER
MakeTrainer = Callable[..., Trainer]
LowBits = Callable[..., MixedPrecisionCallback]
ByHand = Callable[..., dict[str, float]]
Equal = Callable[[nn.Module, nn.Module], bool]


@pytest.mark.parametrize("run", ["validate", "test"])
def test_the_runs_metrics_are_those_of_the_quantized_network(
    by_hand: ByHand,
    low_bits: LowBits,
    make_trainer: MakeTrainer,
    classifier: Any,
    blobs: Any,
    run: str,
) -> None:
    callback = low_bits()
    (found,) = getattr(make_trainer(callbacks=[callback]), run)(classifier, blobs, verbose=False)
    loader = blobs.val_dataloader() if run == "validate" else blobs.test_dataloader()
    assert found == pytest.approx(by_hand(classifier, callback.graph_module, loader), rel=1e-5)
    in_float = by_hand(classifier, callback.float_module, loader)
    assert found["loss"] != pytest.approx(in_float["loss"], rel=1e-3)


def test_only_the_attribute_changes_and_the_float_network_keeps_its_bits(
    equal: Equal, low_bits: LowBits, make_trainer: MakeTrainer, classifier: Any, blobs: Any
) -> None:
    network, before = classifier.model, copy.deepcopy(classifier)
    children = dict(classifier.named_children())
    flags = [child.training for child in network.modules()]
    callback = low_bits()
    make_trainer(callbacks=[callback]).validate(classifier, blobs, verbose=False)
    assert callback.float_module is network
    assert classifier.model is callback.graph_module
    assert [child.training for child in network.modules()] == flags
    for name, child in classifier.named_children():
        assert child is (callback.graph_module if name == "model" else children[name])
    classifier.model = network
    assert equal(classifier, before)


def test_the_graph_is_fit_for_use_after_the_run(
    equal: Equal, low_bits: LowBits, make_trainer: MakeTrainer, classifier: Any, blobs: Any
) -> None:
    callback = low_bits()
    make_trainer(callbacks=[callback]).validate(classifier, blobs, verbose=False)
    graph = callback.graph_module
    expected = graph(blobs.images)
    classifier.train()
    classifier.eval()
    assert torch.equal(graph(blobs.images), expected)
    assert not any(t.is_inference() for t in (*graph.parameters(), *graph.buffers()))
    graph(blobs.images).sum().backward()
    assert state_of(graph).choices == callback.plan.choices
    assert callback.quantized.solve("weights=100%").plan.choices != callback.plan.choices


@pytest.mark.parametrize("target", ["reference", "onnxruntime"])
def test_the_graph_converts(
    make_trainer: MakeTrainer, classifier: Any, blobs: Any, tmp_path: Path, target: str
) -> None:
    callback = MixedPrecisionCallback(target, "weights=40%", calibration_batches=4)
    make_trainer(callbacks=[callback]).validate(classifier, blobs, verbose=False)
    converted = fxmpq.convert(callback.graph_module, output=tmp_path / "model")
    assert converted.target == callback.plan.target == target
    assert converted.sqnr_db > 25
    assert converted.run(blobs.images[:5])[0].shape == (5, 4)


def test_predictions_are_those_of_the_quantized_network(
    equal: Equal, low_bits: LowBits, make_trainer: MakeTrainer, classifier: Any, blobs: Any
) -> None:
    callback = low_bits()
    found = make_trainer(callbacks=[callback]).predict(classifier, datamodule=blobs)
    classifier.eval()
    with torch.no_grad():
        expected = [
            callback.graph_module(classifier.norm(images))
            for images, _ in blobs.predict_dataloader()
        ]
    assert torch.equal(torch.cat(found), torch.cat(expected))


def test_the_plan_goes_to_the_log_folder_and_the_logger(
    low_bits: LowBits, make_trainer: MakeTrainer, classifier: Any, blobs: Any, tmp_path: Path
) -> None:
    logger, callback = CSVLogger(tmp_path, name="run"), low_bits()
    make_trainer(logger=logger, callbacks=[callback]).validate(classifier, blobs, verbose=False)
    assert fxmpq.Plan.from_json(Path(logger.log_dir) / "plan.json") == callback.plan
    rows = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    logged = [dict(zip(rows[0].split(","), row.split(","), strict=True)) for row in rows[1:]]
    weights = [float(row["fxmpq/weights"]) for row in logged if row["fxmpq/weights"]]
    assert weights == [callback.plan.costs["weights"]]


def test_a_folder_of_ones_own_comes_first(
    low_bits: LowBits, make_trainer: MakeTrainer, classifier: Any, blobs: Any, tmp_path: Path
) -> None:
    callback = low_bits(report_dir=tmp_path / "mine")
    make_trainer(callbacks=[callback]).validate(classifier, blobs, verbose=False)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    assert fxmpq.Plan.from_json(tmp_path / "mine" / "plan.json") == callback.plan


@pytest.mark.parametrize("method", ["projected", "sqnr"])
def test_equal_runs_give_equal_plans_whatever_the_random_state(
    low_bits: LowBits, make_trainer: MakeTrainer, classifier: Any, blobs: Any, method: str
) -> None:
    plans = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        callback = low_bits(method=method)
        module = copy.deepcopy(classifier)
        make_trainer(callbacks=[callback]).validate(module, blobs, verbose=False)
        plans.append((callback.plan.choices, callback.plan.loss, callback.plan.method))
    assert plans[0] == plans[1]
    assert plans[0][2] == method


def test_options_pins_and_exclusions_reach_quantize(
    low_bits: LowBits, make_trainer: MakeTrainer, classifier: Any, blobs: Any
) -> None:
    losses = set()
    for options in ({}, {"seed": 1}, {"probes": 3}, {"bias_correction": False}, {"ranges": "kl"}):
        callback = low_bits(budget="bops=90%", keep={"3": "w2a4"}, exclude=["7"], **options)
        module = copy.deepcopy(classifier)
        make_trainer(callbacks=[callback]).validate(module, blobs, verbose=False)
        assert callback.plan.layers == {"0": "w4a8", "3": "w2a4", "7": "fp32"}
        losses.add(callback.plan.loss)
    assert len(losses) == 5


def test_ties_reach_quantize(
    low_bits: LowBits, make_trainer: MakeTrainer, classifier: Any, blobs: Any
) -> None:
    callback = low_bits(budget="bops=90%", ties=[("0", "7")])
    make_trainer(callbacks=[callback]).validate(classifier, blobs, verbose=False)
    assert set(callback.plan.choices) == {"0", "3"}
    assert callback.plan.layers["7"] == callback.plan.layers["0"]


@pytest.mark.parametrize("run", ["validate", "fit"])
def test_the_network_is_refined(
    coarse_refinement: list[str],
    low_bits: LowBits,
    make_trainer: MakeTrainer,
    classifier: Any,
    blobs: Any,
    run: str,
) -> None:
    callback = low_bits(refine="coarse")
    trainer = make_trainer(callbacks=[callback], max_epochs=1)
    getattr(trainer, run)(classifier, blobs)
    assert coarse_refinement == ["0", "3", "7"]
    assert [found.layer for found in state_of(callback.graph_module).refinements] == ["0", "3", "7"]
    assert classifier.model is callback.graph_module
    assert "refine" in callback.quantized.seconds
    converted = fxmpq.convert(callback.graph_module)
    batch = blobs.images[:5]
    assert torch.equal(converted.run(batch)[0], callback.graph_module(batch))


def test_a_network_made_in_setup_is_found(
    low_bits: LowBits, make_trainer: MakeTrainer, classifier: Any, blobs: Any
) -> None:
    class Late(type(classifier)):  # type: ignore[misc]
        def setup(self, stage: str) -> None:
            self.model = classifier.model

    module = Late()
    del module.model
    callback = low_bits()
    make_trainer(callbacks=[callback]).validate(module, blobs, verbose=False)
    assert module.model is callback.graph_module
    assert all(child.training for child in callback.float_module.modules())


def test_what_is_not_in_the_module_follows_it_when_the_run_ends(
    low_bits: LowBits, make_trainer: MakeTrainer, classifier: Any, blobs: Any
) -> None:
    callback = low_bits()
    trainer = make_trainer(callbacks=[callback])
    trainer.validate(classifier, blobs, verbose=False)
    classifier.to("meta")  # stands for the CPU on which a run on a GPU ends
    callback.teardown(trainer, classifier, "validate")
    left = [*callback.float_module.parameters(), *callback.quantized.calibrated.buffers()]
    assert {tensor.device.type for tensor in left} == {"meta"}
