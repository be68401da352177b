from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from fxmpq.errors import CalibrationError, FxmpqError
from fxmpq.formats import Precision
from fxmpq.graph.state import state_of
from fxmpq.graph.trace import trace
from fxmpq.journal import Journal
from fxmpq.quantizers.modules import ActivationQuantizer, WeightQuantizer
from fxmpq.sensitivity.curvature import Curvature
from fxmpq.sensitivity.hessian import hessian
from fxmpq.training.loss import classification_loss
from fxmpq.work import Work

from .conftest import squared

Calibrated = Callable[..., fx.GraphModule]
Labelled = list[tuple[Tensor, Tensor]]
CANDIDATES = [Precision.parse(name) for name in ("w2a4", "w4a8", "w8")]


class Perceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.tanh(self.fc1(x)))


@pytest.fixture(scope="module")
def labelled() -> Labelled:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(n, 6, generator=generator), torch.randint(0, 4, (n,), generator=generator))
        for n in (8, 4)
    ]


@pytest.fixture(scope="module")
def perceptron(calibrated: Calibrated, labelled: Labelled) -> fx.GraphModule:
    torch.manual_seed(0)
    graph = trace(Perceptron().eval(), labelled[0][0])
    return calibrated(graph, [x for x, _ in labelled], candidates=CANDIDATES)


@pytest.fixture(scope="module")
def diagonal(calibrated: Calibrated) -> tuple[fx.GraphModule, Labelled]:
    """A linear layer whose Hessians are diagonal, so that every draw is exact."""
    model = nn.Sequential(nn.Linear(4, 4))
    turns = [torch.tensor([[cos, -sin], [sin, cos]]) for cos, sin in ((0.8, 0.6), (0.96, 0.28))]
    with torch.no_grad():
        model[0].weight.copy_(torch.block_diag(*turns))
    x = torch.tensor([3.0, 1.3, -0.7, 0.45]).diag()
    return calibrated(trace(model, x), [x], candidates=CANDIDATES), [(x, torch.ones(4, 4))]


def noise_of(graph: fx.GraphModule, group: str, precision: Precision, x: Tensor) -> list[float]:
    """Squared rounding errors of a group's one weight, and of its one activation per sample."""
    layer = state_of(graph).group(group).layers[0]
    weights = graph.get_submodule(str(layer.weight_quantizer))
    values = graph.get_submodule(str(layer.input_quantizer))
    assert isinstance(weights, WeightQuantizer)
    assert isinstance(values, ActivationQuantizer)
    weight = graph.get_parameter(layer.weight)
    assert precision.weight is not None
    found = [float((weights.quantize(weight, precision.weight) - weight).square().sum().detach())]
    if precision.activation is not None:
        error = values.quantize(x, precision.activation) - x
        found.append(float(error.square().sum(1).mean()))
    return found


@pytest.mark.parametrize("together", [False, True])
def test_diagonal_hessians_in_closed_form(
    diagonal: tuple[fx.GraphModule, Labelled], together: bool
) -> None:
    graph, batches = diagonal
    x = batches[0][0]
    found = hessian(graph, batches, loss=squared, probes=1, together=together)
    # L = mean ||W x + b - y||^2: per value, 2 mean ||x||^2 / 4 for W, and 2 ||W||^2 / 4 for x.
    traces = [2 * float(x.square().sum(1).mean()) / 4, 2 * 4 / 4]
    assert (found.method, found.unit) == ("hessian", "score")
    assert found.fingerprint == state_of(graph).fingerprint
    for precision in CANDIDATES:
        noise = noise_of(graph, "0", precision, x)
        expected = sum(trace * power for trace, power in zip(traces, noise, strict=False))
        assert found.value("0", precision) == pytest.approx(expected, rel=1e-5)


def test_formats_of_one_width_have_noise_of_their_own(calibrated: Calibrated) -> None:
    model = nn.Sequential(nn.Linear(8, 3))
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    candidates = [Precision.parse(name) for name in ("w4a8", "w4b4a8", "we2m1a8", "w4ae4m3")]
    graph = calibrated(trace(model, x), [x], candidates=candidates)
    batches = [(x, torch.ones(16, 3))]
    found = hessian(graph, batches, loss=squared, probes=1, seed=2)
    noise = {precision: noise_of(graph, "0", precision, x) for precision in candidates}
    values = [found.value("0", precision) for precision in candidates]
    columns = np.array([noise[precision] for precision in candidates])
    traces, *_ = np.linalg.lstsq(columns, np.array(values), rcond=None)
    assert columns @ traces == pytest.approx(values, rel=1e-4)
    assert len({round(value, 9) for value in values}) == 4


def test_values_are_traces_times_noise(perceptron: fx.GraphModule, labelled: Labelled) -> None:
    curvature = Curvature(perceptron, classification_loss, activations=True)
    blocks = [(name,) for name in (*curvature.weights, *curvature.activations)]
    draws = [curvature.draw(labelled, blocks, seed=5, number=number) for number in range(3)]
    traces = np.abs(np.mean(draws, axis=0))
    found = hessian(perceptron, labelled, loss=classification_loss, probes=3, seed=5)
    x = torch.cat([x for x, _ in labelled])
    for precision in CANDIDATES:
        weight, *value = noise_of(perceptron, "fc1", precision, x)
        expected = traces[0] * weight + sum(traces[2] * power for power in value)
        assert found.value("fc1", precision) == pytest.approx(expected, rel=1e-5)


def test_weights_alone(perceptron: fx.GraphModule, labelled: Labelled) -> None:
    options = {"loss": classification_loss, "tolerance": 0.0, "probes": 2}
    alone = hessian(perceptron, labelled, activations=False, **options)
    both = hessian(perceptron, labelled, **options)
    assert alone.value("fc1", "w2a4") < both.value("fc1", "w2a4")
    x = torch.cat([x for x, _ in labelled])
    ratio = [alone.value("fc1", p) / noise_of(perceptron, "fc1", p, x)[0] for p in CANDIDATES]
    assert ratio == pytest.approx([ratio[0]] * 3, rel=1e-5)


@settings(max_examples=5)
@given(st.integers(-8, 8), st.integers(0, 2**32))
def test_scores_are_in_units_of_the_loss(
    perceptron: fx.GraphModule, labelled: Labelled, exponent: int, seed: int
) -> None:
    def scaled(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return 2.0**exponent * classification_loss(model, batch)

    one = hessian(perceptron, labelled, loss=classification_loss, probes=2, seed=seed)
    other = hessian(perceptron, labelled, loss=scaled, probes=2, seed=seed)
    for entry in one.entries:
        assert other.value(*entry) == pytest.approx(2.0**exponent * one.value(*entry), rel=1e-4)


def test_seeds(perceptron: fx.GraphModule, labelled: Labelled) -> None:
    def values(seed: int) -> object:
        return hessian(perceptron, labelled, loss=classification_loss, probes=3, seed=seed).values

    state = torch.get_rng_state()
    assert values(1) == values(1)
    assert values(1) != values(2)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("together", [False, True])
def test_an_interrupted_run_resumes_to_the_same_bits(
    perceptron: fx.GraphModule, labelled: Labelled, tmp_path: Path, together: bool
) -> None:
    calls = 0

    def interrupted(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 10:
            raise KeyboardInterrupt
        return classification_loss(model, batch)

    options = {"probes": 8, "tolerance": 0.01, "together": together}
    whole = hessian(perceptron, labelled, loss=classification_loss, **options)
    path = tmp_path / "hessian.journal"
    with pytest.raises(KeyboardInterrupt):
        hessian(
            perceptron, labelled, loss=interrupted, work=Work(journal=Journal(path, {})), **options
        )
    resumed = hessian(
        perceptron, labelled, loss=interrupted, work=Work(journal=Journal(path, {})), **options
    )
    assert resumed.values == whole.values
    # Two batches a probe, of which four whole ones were kept, and two for the noise.
    assert calls == 10 + 2 * 4 + 2


class Noted(Work):
    """Remembers the names of its units."""

    def __init__(self) -> None:
        super().__init__()
        self.units: list[str] = []

    def unit(self, name: str, compute: Callable[[], Sequence[float]]) -> list[float]:
        self.units.append(name)
        return super().unit(name, compute)


def test_settled_tensors_are_drawn_no_more(
    diagonal: tuple[fx.GraphModule, Labelled], perceptron: fx.GraphModule, labelled: Labelled
) -> None:
    exact, all_probes = Noted(), Noted()
    hessian(*diagonal, loss=squared, probes=9, work=exact)
    assert exact.units == [*(f"probe {number}" for number in range(3)), "activation noise"]
    options = {"loss": classification_loss, "probes": 9, "tolerance": 0.0}
    hessian(perceptron, labelled, work=all_probes, **options)
    assert all_probes.units == [*(f"probe {number}" for number in range(9)), "activation noise"]


def test_only_tensors_that_vary_are_drawn_on(
    perceptron: fx.GraphModule, labelled: Labelled, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []
    draw = Curvature.draw

    def noted(self: Curvature, batches: object, parts: list, **options: int) -> list[float]:
        drawn.append(len(parts))
        return draw(self, batches, parts, **options)

    monkeypatch.setattr(Curvature, "draw", noted)
    hessian(perceptron, labelled, loss=classification_loss, probes=40, tolerance=0.1)
    assert drawn[:3] == [4] * 3
    assert drawn == sorted(drawn, reverse=True)
    assert drawn[-1] < 4


def test_negative_traces_count_by_their_magnitude_with_a_warning(
    diagonal: tuple[fx.GraphModule, Labelled], caplog: pytest.LogCaptureFixture
) -> None:
    graph, batches = diagonal
    expected = hessian(graph, batches, loss=squared)
    assert not caplog.records
    found = hessian(graph, batches, loss=lambda *args: -squared(*args))
    assert found.values == expected.values
    assert "2 of 2 tensors have a negative Hessian trace" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"probes": 0}, "probes is 0"),
        ({"tolerance": -0.1}, "tolerance is -0.1"),
        ({"tolerance": float("nan")}, "tolerance is nan"),
    ],
)
def test_options_out_of_range(
    perceptron: fx.GraphModule, labelled: Labelled, options: dict[str, float], message: str
) -> None:
    with pytest.raises(FxmpqError, match=message):
        hessian(perceptron, labelled, loss=classification_loss, **options)


def test_no_batches_no_loss_no_ranges_no_curvature(
    perceptron: fx.GraphModule, labelled: Labelled, conv_graph: fx.GraphModule
) -> None:
    with pytest.raises(CalibrationError, match="empty"):
        hessian(perceptron, [], loss=classification_loss)
    with pytest.raises(TypeError, match="loss"):
        hessian(perceptron, labelled)
    with pytest.raises(FxmpqError, match="fxmpq.prepare"):
        hessian(conv_graph, labelled, loss=classification_loss)


def test_a_loss_without_curvature_is_an_error(calibrated: Calibrated, labelled: Labelled) -> None:
    x = labelled[0][0]
    graph = calibrated(trace(nn.Sequential(nn.Linear(6, 6), nn.ReLU()), x), [x])

    def absolute(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return model(batch[0]).abs().mean()

    with pytest.raises(FxmpqError, match="zero everywhere.*cross_entropy"):
        hessian(graph, labelled, loss=absolute)


def test_what_is_no_loss_is_an_error(perceptron: fx.GraphModule, labelled: Labelled) -> None:
    with pytest.raises(FxmpqError, match=r"a loss is a callable loss\(model, batch\).*found str"):
        hessian(perceptron, labelled, loss="cross_entropy")
