from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import fx, nn

from fxmpq.errors import CalibrationError
from fxmpq.graph.trace import trace
from fxmpq.sensitivity.layer_loss import layer_loss
from fxmpq.sensitivity.pairwise import pairwise
from fxmpq.sensitivity.projected import projected
from fxmpq.sensitivity.sensitivity import Sensitivity
from fxmpq.sensitivity.signal import check_base, check_samples, check_signal
from fxmpq.sensitivity.sqnr import sqnr

ESTIMATORS = {
    "projected": projected,
    "sqnr": sqnr,
    "samples": partial(sqnr, average="samples"),
    "layer_loss": partial(layer_loss, score="noise"),
    "pairwise": partial(pairwise, score="noise"),
}


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


@pytest.mark.parametrize(
    ("powers", "message"),
    [
        ([1.0, 0.0, 2.0], "all zero for sample 1 of a batch.*average='ratio'"),
        ([0.0, 0.0], "outputs are all zero on the"),
        ([1.0, float("nan")], "NaN or inf"),
    ],
)
def test_a_sample_without_signal_is_an_error(powers: list[float], message: str) -> None:
    check_samples(torch.tensor([0.5, 1e-30]))
    with pytest.raises(CalibrationError, match=message):
        check_samples(torch.tensor(powers))


def test_a_base_that_is_no_number_is_an_error() -> None:
    check_base(-1.5)
    for value in (float("nan"), float("inf")):
        with pytest.raises(CalibrationError, match=f"unchanged model is {value}"):
            check_base(value)


@pytest.mark.parametrize("estimate", ESTIMATORS.values(), ids=ESTIMATORS)
def test_estimators_of_noise_refuse_a_silent_or_broken_output(
    calibrated: Callable[..., fx.GraphModule], estimate: Callable[..., Sensitivity]
) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 6)
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    graph = calibrated(trace(model, x), [x])
    with pytest.raises(CalibrationError, match="hold NaN or infinite"):
        estimate(graph, [x * float("nan")])
    nn.init.zeros_(model[2].weight)
    nn.init.zeros_(model[2].bias)
    graph = calibrated(trace(model, x), [x])
    with pytest.raises(CalibrationError, match="outputs are all zero"):
        estimate(graph, [x])
