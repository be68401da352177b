from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

from fxmpq.calibration.calibrate import calibrate
from fxmpq.errors import CalibrationError, FxmpqError
from fxmpq.formats import Precision
from fxmpq.graph.prepare import insert_quantizers
from fxmpq.graph.state import state_of
from fxmpq.graph.trace import trace
from fxmpq.journal import Journal
from fxmpq.quantizers.modules import ActivationQuantizer, BiasCorrection, WeightQuantizer
from fxmpq.sensitivity.projected import project_shard, projected
from fxmpq.sensitivity.sensitivity import Sensitivity
from fxmpq.sensitivity.shards import join_shards
from fxmpq.sensitivity.sqnr import sqnr
from fxmpq.targets.registry import get_target
from fxmpq.work import Work

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
def all_probes(perceptron: tuple[Perceptron, fx.GraphModule, Tensor]) -> Sensitivity:
    """With four outputs, four probes are exact."""
    _, graph, x = perceptron
    return projected(graph, [x], probes=4)


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


def moved_outputs(
    model: Perceptron, graph: fx.GraphModule, x: Tensor, precision: str
) -> dict[str, Tensor]:
    """`J_n d_n` of both layers from the explicit Jacobian, `[samples, outputs]`."""
    with torch.no_grad():
        hidden = model.fc1(x)
        # J = W2 diag(relu'): the Jacobian of the output at fc1's output, sample by sample.
        jacobians = model.fc2.weight[None] * (hidden > 0).float()[:, None, :]
        first = local_error(graph, "fc1", Precision.parse(precision), x)
        second = local_error(graph, "fc2", Precision.parse(precision), torch.relu(hidden))
        return {"fc1": torch.einsum("nij,nj->ni", jacobians, first), "fc2": second}


@pytest.mark.parametrize("precision", [str(candidate) for candidate in CANDIDATES])
def test_all_probes_give_the_explicit_jacobians_values(
    perceptron: tuple[Perceptron, fx.GraphModule, Tensor],
    all_probes: Sensitivity,
    precision: str,
) -> None:
    model, graph, x = perceptron
    signal = float(model(x).detach().square().sum())
    for group, moved in moved_outputs(model, graph, x, precision).items():
        expected = float(moved.square().sum()) / signal
        assert all_probes.value(group, precision) == pytest.approx(expected, rel=1e-4)


def test_blocks_and_floats_match_the_explicit_jacobian() -> None:
    torch.manual_seed(3)
    model, x = Perceptron().eval(), torch.randn(12, 6)
    names = ["w4b4a8", "w4a8", "w4ta8", "we2m1a8", "we2m1b16ae4m3", "we4m3ae4m3", "w8ae2m1"]
    prepared = insert_quantizers(
        trace(model, x),
        get_target("reference").rules,
        candidates=[Precision.parse(name) for name in names],
    )
    graph = calibrate(prepared, [x], progress=False)
    found = projected(graph, [x], probes=4)
    signal = float(model(x).detach().square().sum())
    for name in names:
        for group, moved in moved_outputs(model, graph, x, name).items():
            expected = float(moved.square().sum()) / signal
            assert found.value(group, name) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("probes", [1, 3])
def test_few_probes_are_unbiased(
    perceptron: tuple[Perceptron, fx.GraphModule, Tensor], probes: int
) -> None:
    model, graph, x = perceptron
    signal = float(model(x).detach().square().sum())
    runs = [projected(graph, [x], probes=probes, seed=seed) for seed in range(120)]
    moved = moved_outputs(model, graph, x, "w2a8")
    for group, one in moved.items():
        found = np.array([run.value(group, "w2a8") for run in runs])
        error = found.std() / len(runs) ** 0.5
        assert abs(found.mean() - float(one.square().sum()) / signal) < 4 * error
        # What the docstring bounds: sqrt(2 / draws), and samples differ in weight.
        assert found.std() / found.mean() < 2 * (2 / (probes * len(x))) ** 0.5
    index = [runs[0].entries.index((group, "w2a8")) for group in ("fc1", "fc2")]
    pairs = np.array([run.pairs()[index[0], index[1]] for run in runs])
    expected = float((moved["fc1"] * moved["fc2"]).sum()) / signal
    assert abs(pairs.mean() - expected) < 4 * pairs.std() / len(runs) ** 0.5


def test_interactions_match_the_explicit_jacobian(
    perceptron: tuple[Perceptron, fx.GraphModule, Tensor], all_probes: Sensitivity
) -> None:
    model, graph, x = perceptron
    moved = moved_outputs(model, graph, x, "w2a8")
    expected = float((moved["fc1"] * moved["fc2"]).sum())
    expected /= float(model(x).detach().square().sum())
    index = [all_probes.entries.index((group, "w2a8")) for group in ("fc1", "fc2")]
    pairs = all_probes.pairs()
    assert pairs[index[0], index[1]] == pytest.approx(expected, rel=1e-3)
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


@pytest.mark.parametrize("probes", [1, 3])
@pytest.mark.parametrize("size", [16, 13, 1])
def test_rows_do_not_depend_on_the_batches(
    conv_graph: fx.GraphModule, images: list[Tensor], calibrated: Planned, size: int, probes: int
) -> None:
    graph = calibrated(conv_graph, images)
    samples = torch.randn(32, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    whole = projected(graph, [samples], probes=probes).projections
    split = projected(graph, list(samples.split(size)), probes=probes).projections
    assert whole is not None
    assert split is not None
    np.testing.assert_allclose(split, whole, atol=1e-5 * np.abs(whole).max())


@pytest.mark.parametrize("probes", [1, 2])
def test_shards_join_to_the_whole(
    conv_graph: fx.GraphModule, images: list[Tensor], calibrated: Planned, probes: int
) -> None:
    graph = calibrated(conv_graph, images)
    batches = list(torch.randn(20, 3, 16, 16, generator=torch.Generator()).split(4))
    whole = projected(graph, batches, probes=probes, seed=5)
    shards = [
        project_shard(graph, batches[3:], probes=probes, seed=5, first_sample=12),
        project_shard(graph, batches[:3], probes=probes, seed=5),
    ]
    joined = join_shards(shards)
    assert joined.values == whole.values
    assert (joined.fingerprint, joined.method) == (whole.fingerprint, whole.method)
    np.testing.assert_array_equal(joined.projections, whole.projections)


def test_numbers_that_no_probe_has_are_refused_before_the_work(
    perceptron: tuple[Perceptron, fx.GraphModule, Tensor],
) -> None:
    _, graph, x = perceptron
    with pytest.raises(FxmpqError, match="probes=0"):
        projected(graph, [x], probes=0)
    with pytest.raises(CalibrationError, match="empty"):
        project_shard(graph, [])


def test_an_interrupted_run_goes_on(
    perceptron: tuple[Perceptron, fx.GraphModule, Tensor], tmp_path: Path
) -> None:
    _, graph, x = perceptron
    batches = list(x.split(4))
    file = tmp_path / "journal"
    first = Work(journal=Journal(file, {}))
    project_shard(graph, batches[:2], work=first)
    again = Work(journal=Journal(file, {}))
    assert list(Journal(file, {}).done) == ["batch 0 from sample 0", "batch 1 from sample 4"]
    assert projected(graph, batches, work=again).values == projected(graph, batches).values


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
