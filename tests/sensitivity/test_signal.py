from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import fx, nn

from fxmpq.errors import CalibrationError
from fxmpq.graph.trace import trace
from fxmpq.sensitivity.measure import METHODS
from fxmpq.sensitivity.signal import check_signal


@pytest.mark.parametrize("power", [1e-300, 1.0, 1e300])
def test_a_signal_of_any_size_is_accepted(power: float) -> None:
    check_signal(power)


@pytest.mark.parametrize(
    ("power", "message"),
    [(0.0, "outputs are all zero"), (float("nan"), "NaN or inf"), (float("inf"), "NaN or inf")],
)
def test_no_signal_is_an_error(power: float, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        check_signal(power)


@pytest.mark.parametrize("method", METHODS)
def test_both_methods_refuse_a_silent_or_broken_output(
    calibrated: Callable[..., fx.GraphModule], method: str
) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 6)
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    graph = calibrated(trace(model, x), [x])
    with pytest.raises(CalibrationError, match="hold NaN or infinite"):
        METHODS[method](graph, [x * float("nan")])
    nn.init.zeros_(model[2].weight)
    nn.init.zeros_(model[2].bias)
    graph = calibrated(trace(model, x), [x])
    with pytest.raises(CalibrationError, match="outputs are all zero"):
        METHODS[method](graph, [x])
