from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from torch import nn

import fxmpq
from fxmpq.callbacks.strategies import check_strategy, share_plan

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*LeafSpec.*is deprecated",  # Lightning 2.6 and torch 2.13
    "ignore:The 'val_dataloader' does not have many workers",
)
SCRIPT = Path(__file__).with_name("two_ranks.py")


@pytest.mark.parametrize("sharded", [DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy])
@pytest.mark.parametrize("stage", ["fit", "validate", "test"])
def test_sharded_strategies_are_refused(sharded: type[Strategy], stage: str) -> None:
    # DeepSpeedStrategy() asks for its package, which the check does not need.
    strategy = sharded.__new__(sharded)
    with pytest.raises(MisconfigurationException, match=f"{sharded.__name__} gives each process"):
        check_strategy(strategy, stage)


@pytest.mark.parametrize("name", ["ddp_spawn", "ddp_fork", "ddp_notebook"])
def test_training_in_processes_that_end_with_it_is_refused(
    make_trainer: Callable[..., Trainer], name: str
) -> None:
    strategy = make_trainer(strategy=name, devices=2).strategy
    strategy._launcher = _MultiProcessingLauncher(strategy)
    with pytest.raises(MisconfigurationException, match="processes that end with the training"):
        check_strategy(strategy, "fit")
    check_strategy(strategy, "validate")


@pytest.mark.parametrize("strategy", [DDPStrategy(), SingleDeviceStrategy()])
def test_whole_networks_are_taken(strategy: Strategy) -> None:
    for stage in ("fit", "validate", "test", "predict"):
        check_strategy(strategy, stage)


def test_another_process_plan_replaces_the_own(make_trainer: Callable[..., Trainer]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    batches = [torch.randn(16, 8)]
    found = fxmpq.quantize(model, batches, target="reference", budget="weights=60%", progress=False)
    trainer = make_trainer()
    assert share_plan(trainer, found) is found

    choices = dict.fromkeys(found.plan.choices, "w2a8")
    other = replace(found.plan, choices=choices, seconds=123.0)
    assert found.plan.choices != choices
    trainer.strategy.broadcast = lambda text, src=0: other.to_json()
    shared = share_plan(trainer, found)
    assert shared.plan == other
    expected = fxmpq.apply(found.calibrated, choices)(batches[0])
    assert torch.equal(shared.graph(batches[0]), expected)
    assert not torch.equal(found.graph(batches[0]), expected)


def test_another_process_plan_is_refined_as_the_own_was(
    make_trainer: Callable[..., Trainer], coarse_refinement: list[str]
) -> None:
    torch.manual_seed(0)
    model, batches = nn.Sequential(nn.Linear(8, 8)), [torch.randn(16, 8)]
    request = {"target": "reference", "budget": "weights=60%", "progress": False}
    found = fxmpq.quantize(model, batches, **request, refine="coarse")
    other = replace(found.plan, choices=dict.fromkeys(found.plan.choices, "w2a8"))
    trainer = make_trainer()
    trainer.strategy.broadcast = lambda text, src=0: other.to_json()
    shared = share_plan(trainer, found)
    assert coarse_refinement == ["0", "0"]
    assert torch.equal(shared.graph(batches[0]), found.simulate(other.choices)(batches[0]))
    plain = fxmpq.apply(found.calibrated, other.choices)(batches[0])
    assert not torch.equal(shared.graph(batches[0]), plain)


def test_two_processes_find_the_plan_of_one(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.run(
        [sys.executable, str(SCRIPT), str(two)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    runpy.run_path(str(SCRIPT))["run"](one, 1)

    single = json.loads((one / "rank0.json").read_text())
    first, second = (json.loads((two / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert first["outputs"] == single["outputs"]
    plans = [json.loads(found["plan"]) for found in (first, single)]
    for plan in plans:
        del plan["seconds"]  # the solver's wall time
    assert plans[0] == plans[1]
    written = json.loads((two / "plan.json").read_text())
    assert written == json.loads(first["plan"])
