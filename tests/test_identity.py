"""What an option is, as plain data."""

from __future__ import annotations

import json
from collections.abc import Callable
from enum import Enum
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.regression import MinkowskiDistance

from fxmpq.identity import identity

SMOOTHING = 0.1


def smooth(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().mean() * SMOOTHING


def outer(model: nn.Module, batch: Tensor) -> Tensor:
    return smooth(model, batch)


def power(model: nn.Module, batch: Tensor, exponent: int = 2) -> Tensor:
    return model(batch).pow(exponent).mean()


class Reduction(Enum):
    """An option of several."""

    MEAN = 1
    SUM = 2


class Distance:
    """A callable object."""

    def __init__(self, scale: float, teacher: nn.Module | None = None) -> None:
        self.scale = scale
        self.teacher = teacher
        self.myself = self  # a cycle
        self._calls = 0

    def __call__(self, model: nn.Module, batch: Tensor) -> Tensor:
        self._calls += 1
        return self.scale * model(batch).mean()


def teacher(bias: float) -> nn.Linear:
    found = nn.Linear(2, 2)
    with torch.no_grad():
        found.weight.fill_(1)
        found.bias.fill_(bias)
    return found


@pytest.mark.parametrize(
    "make",
    [
        lambda k: lambda model, batch: k * model(batch),
        lambda k: lambda model, batch: model(batch).mean() * torch.tensor([1.0, k]),
        lambda k: partial(power, exponent=k),
        lambda k: eval(f"lambda model, batch: model(batch) * {k}"),
        lambda k: lambda model, batch, factor=k: model(batch) * factor,
        Distance,
        lambda k: Distance(1.0, teacher(k)),
        lambda k: Distance(k).__call__,
        MinkowskiDistance,
        lambda k: MulticlassAccuracy(k + 2, average="macro"),
        lambda k: nn.CrossEntropyLoss(label_smoothing=k / 4),
        lambda k: nn.CrossEntropyLoss(weight=torch.tensor([1.0, k])),
        lambda k: partial(power, exponent=np.full(3, k)),
        lambda k: partial(power, exponent={"a", str(k)}),
        lambda k: partial(power, exponent=Reduction(k)),
        lambda k: partial(power, exponent=range(k)),
        lambda k: {"a": [k, torch.tensor(float(k))]},
    ],
)
def test_equal_options_are_equal_and_others_differ(make: Callable[[int], Any]) -> None:
    """Made twice, as by two processes."""
    assert identity(make(1)) == identity(make(1))
    assert identity(make(1)) != identity(make(2))
    found = identity(make(1))
    assert json.loads(json.dumps(found)) == found


def test_module_level_values_and_functions_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those that a function reads through another one."""
    before = identity(smooth), identity(outer)
    monkeypatch.setitem(globals(), "SMOOTHING", 0.2)
    after = identity(smooth), identity(outer)
    assert before[0] != after[0]
    assert before[1] != after[1]


def test_what_is_counted_or_gathered_does_not_count() -> None:
    """The same loss or metric after some calls is the same."""
    calls = 0

    def counting(model: nn.Module, batch: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return model(batch).mean()

    metric, distance = MulticlassAccuracy(3), Distance(1.0)
    before = identity([counting, metric, distance])
    counting(nn.Identity(), torch.ones(1))
    distance(nn.Identity(), torch.ones(1))
    metric.update(torch.eye(3), torch.arange(3))
    metric.compute()
    metric.eval()
    assert identity([counting, metric, distance]) == before


def test_functions_of_libraries_are_told_by_name() -> None:
    assert identity(nn.functional.mse_loss) != identity(nn.functional.l1_loss)
    assert str(identity(nn.functional.mse_loss)).startswith("torch.nn.functional.mse_loss#")
