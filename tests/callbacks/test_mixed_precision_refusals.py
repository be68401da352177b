from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import FSDPStrategy
from torch import nn

from fxmpq.callbacks import MixedPrecisionCallback
from fxmpq.errors import (
    BudgetError,
    CalibrationError,
    FxmpqError,
    InfeasibleBudgetError,
    PatternError,
    PrecisionError,
    TargetError,
)

from .conftest import QUIET_TRAINER

pytestmark = QUIET_TRAINER
MakeTrainer = Callable[..., Trainer]
LowBits = Callable[..., MixedPrecisionCallback]
Equal = Callable[[nn.Module, nn.Module], bool]


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"exclude": ["conv*"]}, PatternError),
        ({"ties": [("0", "conv*")]}, PatternError),
        ({"budget": "weights=1%"}, InfeasibleBudgetError),
        ({"budget": "memory=10%"}, BudgetError),
        ({"calibration": []}, CalibrationError),
        ({"calibration": [torch.randn(4, 1, 8, 8)]}, MisconfigurationException),
        ({"module": "idle"}, MisconfigurationException),
    ],
)
def test_a_failure_leaves_the_module_as_it_was(
    equal: Equal,
    low_bits: LowBits,
    make_trainer: MakeTrainer,
    classifier: Any,
    blobs: Any,
    settings: Any,
    error: type[Exception],
) -> None:
    classifier.idle = nn.Linear(1, 1)  # a sub-module that no step calls
    network, before = classifier.model, copy.deepcopy(classifier)
    callback = low_bits(**settings)
    with pytest.raises(error):
        make_trainer(callbacks=[callback]).validate(classifier, blobs, verbose=False)
    assert classifier.model is network
    assert equal(classifier, before)
    assert not any(child._forward_pre_hooks for child in classifier.modules())
    with pytest.raises(FxmpqError, match="nothing is quantized yet"):
        _ = callback.plan


def test_a_plan_that_cannot_be_written_leaves_the_module_as_it_was(
    low_bits: LowBits, make_trainer: MakeTrainer, classifier: Any, blobs: Any, tmp_path: Path
) -> None:
    (tmp_path / "taken").write_text("a file")
    network = classifier.model
    with pytest.raises(FileExistsError):
        make_trainer(callbacks=[low_bits(report_dir=tmp_path / "taken")]).validate(
            classifier, blobs, verbose=False
        )
    assert classifier.model is network


@pytest.mark.parametrize(
    ("settings", "error", "text"),
    [
        ({"target": "tpu"}, TargetError, "no target 'tpu'"),
        ({"budget": "weights"}, BudgetError, "metric=amount"),
        ({"budget": "weights=0%"}, BudgetError, "greater than zero"),
        (
            {"target": "reference", "budget": "latency=60%"},
            FxmpqError,
            "latency cannot be measured",
        ),
        ({"method": "hesian"}, FxmpqError, "no sensitivity method 'hesian'"),
        ({"candidates": ["8bit"]}, PrecisionError, "cannot read the precision '8bit'"),
        ({"keep": {"*": "w9a9"}}, PrecisionError, "legal widths"),
        ({"target": "onnxruntime", "candidates": ["w3a8"]}, PrecisionError, "cannot run w3a8"),
        ({"probe": 3}, FxmpqError, "no option 'probe'.*'probes'"),
        ({"method": "sqnr", "seed": 3}, FxmpqError, "no option 'seed' with the method 'sqnr'"),
        ({"calibration_batches": 0}, CalibrationError, "at least 1; found 0"),
        ({"refine": "coars"}, FxmpqError, "no refinement 'coars'"),
        ({"ties": "encoder.*"}, PatternError, r"ties is a list of ties, as \['encoder.\*'\]"),
    ],
)
def test_unusable_arguments_are_refused_at_once(
    settings: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        MixedPrecisionCallback(**settings)


def test_results_before_a_run_are_an_error() -> None:
    for name in ("plan", "graph_module", "float_module", "quantized"):
        with pytest.raises(FxmpqError, match=r"run trainer\.validate"):
            getattr(MixedPrecisionCallback(), name)


def test_setup_refuses_a_missing_submodule(
    low_bits: LowBits, make_trainer: MakeTrainer, classifier: Any, blobs: Any
) -> None:
    with pytest.raises(MisconfigurationException, match="children are: 'norm', 'model'"):
        make_trainer(callbacks=[low_bits(module="net")]).validate(classifier, blobs)


def test_setup_refuses_sharded_strategies(
    low_bits: LowBits, make_trainer: MakeTrainer, classifier: Any
) -> None:
    trainer = make_trainer()
    trainer._accelerator_connector.strategy = FSDPStrategy()
    with pytest.raises(MisconfigurationException, match="FSDPStrategy"):
        low_bits().setup(trainer, classifier, "fit")
