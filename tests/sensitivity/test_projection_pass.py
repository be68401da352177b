from __future__ import annotations

import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

from fxmpq.formats import Precision
from fxmpq.graph.batches import flat_inputs
from fxmpq.graph.state import Layer, state_of
from fxmpq.graph.trace import trace
from fxmpq.quantizers.modules import ActivationQuantizer
from fxmpq.sensitivity import projection_pass
from fxmpq.sensitivity.changes import WeightChanges, weight_changes
from fxmpq.sensitivity.probes import draw_probes
from fxmpq.sensitivity.projected import projected
from fxmpq.sensitivity.projection_pass import ProjectionPass
from fxmpq.sensitivity.sqnr import sqnr

Planned = Callable[..., fx.GraphModule]


class Living:
    """Counts tensors that are alive, and the most that ever were at once."""

    def __init__(self) -> None:
        self.references: list[weakref.ref[Tensor]] = []
        self.most = 0

    def note(self, tensor: Tensor) -> None:
        self.references.append(weakref.ref(tensor))
        self.most = max(self.most, self.now())

    def now(self) -> int:
        return sum(reference() is not None for reference in self.references)


@pytest.mark.parametrize("probes", [1, 2])
def test_local_errors_live_one_at_a_time(
    conv_graph: fx.GraphModule,
    images: list[Tensor],
    calibrated: Planned,
    monkeypatch: pytest.MonkeyPatch,
    probes: int,
) -> None:
    graph = calibrated(conv_graph, images)
    weights, activations = Living(), Living()
    quantize = ActivationQuantizer.quantize

    def noted_changes(*args: object) -> WeightChanges:
        found = weight_changes(*args)  # type: ignore[arg-type]
        weights.note(found.weights)
        return found

    def noted_quantize(*args: object) -> Tensor:
        found = quantize(*args)  # type: ignore[arg-type]
        activations.note(found)
        return found

    monkeypatch.setattr(projection_pass, "weight_changes", noted_changes)
    monkeypatch.setattr(ActivationQuantizer, "quantize", noted_quantize)
    ProjectionPass(graph).project(flat_inputs(graph, images[0]), probes, seed=0, first_sample=0)
    layers = sum(len(group.layers) for group in state_of(graph).groups)
    quantizers = sum(len(group.activation_quantizers) for group in state_of(graph).groups)
    assert len(weights.references) == probes * layers
    assert weights.most == 1
    # One activation width; a rounded tensor serves all its readers and its own quantizer. At the
    # block's end both the sum's and the shortcut's are under way.
    assert len(activations.references) == probes * quantizers
    assert activations.most <= 2
    assert weights.now() == activations.now() == 0


def test_only_rows_that_a_batch_reads_are_rounded(
    bert_graph: fx.GraphModule,
    token_batches: list[dict[str, Tensor]],
    calibrated: Planned,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    graph = calibrated(bert_graph, token_batches)
    sizes: dict[str, int] = {}

    def noted(graph: fx.GraphModule, layer: Layer, rows: Tensor | None) -> WeightChanges:
        found = weight_changes(graph, layer, rows)
        sizes[layer.name] = found.weights.shape[1]
        return found

    monkeypatch.setattr(projection_pass, "weight_changes", noted)
    ProjectionPass(graph).project(flat_inputs(graph, token_batches[0]), 1, seed=0, first_sample=0)
    read = token_batches[0]["input_ids"].unique()
    assert sizes["bert.embeddings.word_embeddings"] == len(read)
    assert sizes["classifier"] == graph.get_parameter("classifier.weight").shape[0]


def test_rows_are_gradients_times_local_errors(
    conv_graph: fx.GraphModule, images: list[Tensor], calibrated: Planned
) -> None:
    graph = calibrated(conv_graph, images)
    rows, powers = ProjectionPass(graph).project(
        flat_inputs(graph, images[0]), 2, seed=3, first_sample=7
    )
    outputs = graph(images[0])
    torch.testing.assert_close(powers, outputs.detach().double().square().sum(1))
    groups = state_of(graph).groups
    last = groups[-1]
    column = sum(len(group.candidates) for group in groups[:-1])
    layer = last.layers[0]
    assert layer.name == "fc"
    change = weight_changes(graph, layer)
    assert change.shifts is not None
    probes = draw_probes(outputs.detach(), 2, seed=3, first_sample=7)
    quantizer = graph.get_submodule(str(layer.input_quantizer))
    features = _input_of(graph, layer, images[0])
    assert isinstance(quantizer, ActivationQuantizer)
    for index, candidate in enumerate(last.candidates):
        assert candidate.activation is not None
        assert candidate.weight is not None
        width = change.formats.index(candidate.weight)
        seen = quantizer.quantize(features, candidate.activation)
        error = seen @ change.weights[width].T + change.shifts[width]
        if str(layer.input_quantizer) in last.activation_quantizers:
            error = error + (seen - features) @ graph.get_parameter(layer.weight).T
        expected = torch.einsum("pnd,nd->np", probes, error)
        torch.testing.assert_close(rows[:, :, column + index], expected, atol=1e-4, rtol=1e-3)


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


class SharedMap(nn.Module):
    """A convolution of a map without a batch dimension, which belongs to no sample."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Parameter(torch.randn(3, 6, 6))
        self.conv, self.up = nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 3, 2)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x) * self.up(self.conv(self.map).relu()).mean((1, 2))


@pytest.mark.parametrize(
    ("model", "shape", "seeds"),
    [
        (PositionsFirst, (8, 8, 16), 1),
        (PositionsFirst, (8, 7, 16), 1),
        (Frames, (8, 4, 3, 6, 6), 1),
        # What all samples share gets one draw a probe, not one a sample.
        (SharedTable, (8, 6), 32),
        (SharedMap, (8, 6), 32),
    ],
)
def test_samples_that_do_not_lie_first(
    model: type[nn.Module], shape: tuple[int, ...], seeds: int, calibrated: Planned
) -> None:
    torch.manual_seed(0)
    made = model().eval()
    # What samples have in common makes errors of positions add up.
    x = torch.randn(shape) + 2 * torch.randn(shape[0], *[1] * (len(shape) - 2), shape[-1])
    graph = calibrated(trace(made, x), [x], candidates=[Precision.parse("w6a8")])
    exact = sqnr(graph, [x])
    runs = [projected(graph, [x], probes=300, seed=seed) for seed in range(seeds)]
    for group, precision in exact.entries:
        found = sum(run.value(group, precision) for run in runs) / seeds
        assert found == pytest.approx(exact.value(group, precision), rel=0.25)


def _input_of(graph: fx.GraphModule, layer: Layer, x: Tensor) -> Tensor:
    interpreter = fx.Interpreter(graph, garbage_collect_values=False)
    with torch.no_grad():
        interpreter.run(*flat_inputs(graph, x), enable_io_processing=False)
    node = next(node for node in graph.graph.nodes if node.name == layer.node)
    found: Tensor = interpreter.env[node.all_input_nodes[0]]
    return found


def test_layers_that_all_stay_float_project_nothing(
    conv_graph: fx.GraphModule, images: list[Tensor], calibrated: Planned
) -> None:
    graph = calibrated(conv_graph, images, exclude=["*"])
    found = projected(graph, images)
    assert {name: set(values) for name, values in found.values.items()} == {
        group.name: {"fp32"} for group in state_of(graph).groups
    }
    assert not found.projections.any()
