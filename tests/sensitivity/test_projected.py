from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

from fxmpq.calibration.calibrate import calibrate
from fxmpq.formats import Precision
from fxmpq.graph.prepare import insert_quantizers
from fxmpq.graph.state import state_of
from fxmpq.graph.trace import trace
from fxmpq.quantizers.modules import ActivationQuantizer, BiasCorrection, WeightQuantizer
from fxmpq.sensitivity.projected import projected
from fxmpq.sensitivity.sensitivity import Sensitivity
from fxmpq.sensitivity.sqnr import sqnr
from fxmpq.targets.registry import get_target

Planned = Callable[..., fx.GraphModule]
CANDIDATES = [Precision.parse(name) for name in ("w2a8", "w4a4", "w4a8", "w8")]


class Perceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(6, 8)
        self.fc2 = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.relu(self.fc1(x)))


@pytest.fixture(scope="module")
def perceptron() -> tuple[Perceptron, fx.GraphModule, Tensor]:
    torch.manual_seed(0)
    model = Perceptron().eval()
    x = torch.randn(12, 6)
    prepared = insert_quantizers(
        trace(model, x), get_target("reference").rules, candidates=CANDIDATES
    )
    return model, calibrate(prepared, [x], progress=False), x


@pytest.fixture(scope="module")
def many_probes(perceptron: tuple[Perceptron, fx.GraphModule, Tensor]) -> Sensitivity:
    _, graph, x = perceptron
    return projected(graph, [x], probes=2000)


def local_error(graph: fx.GraphModule, group_name: str, precision: Precision, x: Tensor) -> Tensor:
    """What a precision changes at the output of a linear layer, from its definition."""
    group = state_of(graph).group(group_name)
    layer = group.layers[0]
    weights = graph.get_submodule(str(layer.weight_quantizer))
    bias = graph.get_submodule(str(layer.bias_correction))
    inputs = graph.get_submodule(str(layer.input_quantizer))
    assert isinstance(weights, WeightQuantizer)
    assert isinstance(bias, BiasCorrection)
    assert isinstance(inputs, ActivationQuantizer)
    weight = graph.get_parameter(layer.weight)
    assert precision.weight is not None
    rounded = weights.quantize(weight, precision.weight)
    seen = x if precision.activation is None else inputs.quantize(x, precision.activation)
    return seen @ rounded.T - x @ weight.T + bias.shift(precision.weight)


@pytest.mark.parametrize("precision", [str(candidate) for candidate in CANDIDATES])
def test_converges_to_the_explicit_jacobian(
    perceptron: tuple[Perceptron, fx.GraphModule, Tensor],
    many_probes: Sensitivity,
    precision: str,
) -> None:
    model, graph, x = perceptron
    with torch.no_grad():
        hidden = model.fc1(x)
        slope = (hidden > 0).float()
        signal = model(x).square().sum()
        first = local_error(graph, "fc1", Precision.parse(precision), x)
        # J = W2 diag(relu'): the Jacobian of the output at fc1's output, sample by sample.
        jacobians = model.fc2.weight[None] * slope[:, None, :]
        moved = torch.einsum("nij,nj->ni", jacobians, first)
        second = local_error(graph, "fc2", Precision.parse(precision), torch.relu(hidden))
        expected = {"fc1": moved.square().sum() / signal, "fc2": second.square().sum() / signal}
    for group, value in expected.items():
        assert many_probes.value(group, precision) == pytest.approx(float(value), rel=0.08)


def test_interactions_match_the_explicit_jacobian(
    perceptron: tuple[Perceptron, fx.GraphModule, Tensor], many_probes: Sensitivity
) -> None:
    model, graph, x = perceptron
    with torch.no_grad():
        hidden = model.fc1(x)
        jacobians = model.fc2.weight[None] * (hidden > 0).float()[:, None, :]
        low = Precision.parse("w2a8")
        moved = torch.einsum("nij,nj->ni", jacobians, local_error(graph, "fc1", low, x))
        second = local_error(graph, "fc2", low, torch.relu(hidden))
        expected = float((moved * second).sum() / model(x).square().sum())
        scale = float((moved.norm() * second.norm()) / model(x).square().sum())
    index = [many_probes.entries.index((group, "w2a8")) for group in ("fc1", "fc2")]
    pairs = many_probes.pairs()
    assert pairs[index[0], index[1]] == pytest.approx(expected, abs=0.05 * scale)
    assert np.linalg.eigvalsh(pairs).min() > -1e-9


def test_values_are_the_mean_squares_of_the_projections(
    perceptron: tuple[Perceptron, fx.GraphModule, Tensor],
) -> None:
    _, graph, x = perceptron
    found = projected(graph, [x[:8], x[8:]], probes=3)
    assert found.projections is not None
    assert found.projections.shape == (36, len(found.entries))
    values = [found.value(*entry) for entry in found.entries]
    np.testing.assert_allclose(np.diag(found.pairs()), values, rtol=1e-12)


def test_same_seed_is_bit_identical_and_another_is_not(
    conv_graph: fx.GraphModule, images: list[Tensor], calibrated: Planned
) -> None:
    graph = calibrated(conv_graph, images)
    one, two = projected(graph, images, seed=3), projected(graph, images, seed=3)
    assert one.values == two.values
    assert one.values != projected(graph, images, seed=4).values


@pytest.mark.parametrize("target", ["reference", "onnxruntime"])
def test_agrees_with_the_exact_sweep_on_convolutions(
    conv_graph: fx.GraphModule, images: list[Tensor], calibrated: Planned, target: str
) -> None:
    candidates = [Precision.parse(name) for name in ("w4a8", "w8a8")]
    graph = calibrated(conv_graph, images, target, candidates=candidates)
    exact = sqnr(graph, images)
    found = projected(graph, images, probes=200)
    for group, precision in exact.entries:
        # ReLUs and values that are rounded twice keep first order from being exact.
        assert found.value(group, precision) == pytest.approx(
            exact.value(group, precision), rel=0.5
        )


def test_agrees_with_the_exact_sweep_on_attention(
    bert_graph: fx.GraphModule, token_batches: list[dict[str, Tensor]], calibrated: Planned
) -> None:
    candidates = [Precision.parse("w8a8")]
    graph = calibrated(bert_graph, token_batches, candidates=candidates)
    exact = sqnr(graph, token_batches)
    found = projected(graph, token_batches, probes=300)
    for group, precision in exact.entries:
        assert found.value(group, precision) == pytest.approx(
            exact.value(group, precision), rel=0.35
        )


def test_does_not_leave_gradients_or_change_the_graph(
    conv_graph: fx.GraphModule, images: list[Tensor], calibrated: Planned
) -> None:
    graph = calibrated(conv_graph, images)
    before = {name: tensor.clone() for name, tensor in graph.state_dict().items()}
    projected(graph, images)
    assert all(parameter.grad is None for parameter in graph.parameters())
    for name, tensor in graph.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_works_inside_inference_mode(
    conv_graph: fx.GraphModule, images: list[Tensor], calibrated: Planned
) -> None:
    graph = calibrated(conv_graph, images)
    with torch.inference_mode():
        inside = projected(graph, images)
    assert inside.values == projected(graph, images).values


@pytest.mark.parametrize("size", [16, 13, 1])
def test_rows_of_one_probe_do_not_depend_on_the_batches(
    conv_graph: fx.GraphModule, images: list[Tensor], calibrated: Planned, size: int
) -> None:
    graph = calibrated(conv_graph, images)
    samples = torch.randn(32, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    whole = projected(graph, [samples]).projections
    split = projected(graph, list(samples.split(size))).projections
    assert whole is not None
    assert split is not None
    np.testing.assert_allclose(split, whole, atol=1e-5 * np.abs(whole).max())


class PositionsFirst(nn.Module):
    """Attention whose linear layers see `[T, N, E]` and `[T * N, E]`."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x).mean(1))


class Frames(nn.Module):
    """A convolution over the frames of every sample, which are merged with the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        features = self.conv(x.flatten(0, 1)).relu().mean((2, 3))
        return self.head(features.view(-1, 4, 4).mean(1))


class SharedTable(nn.Module):
    """A layer over a table that belongs to no sample."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(8, 6))
        self.scores, self.head = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x) * torch.tanh(self.scores(self.table)).mean(0)


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (PositionsFirst, (8, 8, 16)),
        (PositionsFirst, (8, 7, 16)),
        (Frames, (8, 4, 3, 6, 6)),
        (SharedTable, (8, 6)),
    ],
)
def test_samples_that_do_not_lie_first(
    model: type[nn.Module], shape: tuple[int, ...], calibrated: Planned
) -> None:
    torch.manual_seed(0)
    made = model().eval()
    # What samples have in common makes errors of positions add up.
    x = torch.randn(shape) + 2 * torch.randn(shape[0], *[1] * (len(shape) - 2), shape[-1])
    graph = calibrated(trace(made, x), [x], candidates=[Precision.parse("w6a8")])
    exact, found = sqnr(graph, [x]), projected(graph, [x], probes=300)
    for group, precision in exact.entries:
        assert found.value(group, precision) == pytest.approx(
            exact.value(group, precision), rel=0.25
        )


def test_excluded_groups_have_no_noise(
    conv_graph: fx.GraphModule, images: list[Tensor], calibrated: Planned
) -> None:
    graph = calibrated(conv_graph, images, exclude=["conv1"])
    found = projected(graph, images)
    assert found.values["conv1"] == {"fp32": 0.0}
    assert all(value > 0 for name in ("fc", "conv2") for value in found.values[name].values())


def test_layers_without_bias_correction(conv_graph: fx.GraphModule, images: list[Tensor]) -> None:
    prepared = insert_quantizers(
        conv_graph, get_target("reference").rules, candidates=[Precision.parse("w6a8")]
    )
    graph = calibrate(prepared, images, bias_correction=False, progress=False)
    exact, found = sqnr(graph, images), projected(graph, images, probes=200)
    for group, precision in exact.entries:
        assert found.value(group, precision) == pytest.approx(
            exact.value(group, precision), rel=0.5
        )
