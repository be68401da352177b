"""Planned graphs of many shapes, with batches of different sizes, for the tests of refinement."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from transformers import ViTConfig, ViTForImageClassification

import fxmpq
from fxmpq.formats import Precision
from fxmpq.graph.batches import flat_inputs
from fxmpq.graph.state import Refinement, require
from fxmpq.graph.switch import with_choices
from fxmpq.graph.trace import trace
from fxmpq.quantizers.modules import ActivationQuantizer, BiasCorrection, WeightQuantizer
from fxmpq.refinement.adaquant import adaquant
from fxmpq.refinement.methods import METHODS, RECIPES, Method
from fxmpq.refinement.units import Units, quantizer_tensors
from fxmpq.refinement.views import LayerView
from fxmpq.refinement.walk import Walk


@dataclass(frozen=True)
class Subject:
    """A graph in float and planned, with its batches."""

    calibrated: fx.GraphModule
    planned: fx.GraphModule
    batches: list


class Tied(nn.Module):
    """An embedding whose weight is the last layer's too, and a layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.twice = nn.Embedding(12, 6), nn.Linear(6, 6)
        self.head = nn.Linear(6, 12, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.relu(self.twice(self.embedding(ids)))
        return self.head(torch.relu(self.twice(x) + x))


class TwoInputs(nn.Module):
    """Two inputs, paths in parallel, a bias that is computed, nested outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Linear(6, 5), nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor, y: Tensor) -> dict[str, object]:
        left, right = self.left(x).relu(), self.right(y)
        scaled = nn.functional.linear(left + right, self.head.weight, self.head.bias * 2)
        return {"logits": scaled, "paths": (left, scaled.argmax(-1)), "right": right}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="session")
def plan_of(calibrated: Callable[..., fx.GraphModule]) -> Callable[..., Subject]:
    """Traces, calibrates and plans: the groups take the precisions in turn."""

    def make(
        model: nn.Module,
        batches: list,
        precisions: tuple[str, ...] = ("w3a8", "w2a4", "w8a8"),
        target: str = "reference",
        **options: object,
    ) -> Subject:
        candidates = sorted({Precision.parse(p) for p in precisions}, key=lambda p: p.sort_key)
        graph = model if isinstance(model, fx.GraphModule) else trace(model.eval(), batches[0])
        found = calibrated(graph, batches, target, candidates=candidates, **options)
        choices = {}
        for index, group in enumerate(require(found, stage="calibrated").groups):
            wanted = Precision.parse(precisions[index % len(precisions)])
            fitting = [c for c in group.candidates if c.weight == wanted.weight]
            choices[group.name] = str((fitting or group.candidates)[-1])
        return Subject(found, with_choices(found, choices), batches)

    return make


@pytest.fixture(scope="session")
def vit() -> nn.Module:
    torch.manual_seed(6)
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=16,
        patch_size=8,
        num_labels=4,
        initializer_range=0.3,
    )
    return ViTForImageClassification(config).eval()


NAMES = (
    "conv",
    "conv_onnxruntime",
    "resnet_onnxruntime",
    "bert",
    "bert_onnxruntime",
    "vit",
    "tied",
    "two_inputs",
)
ORT = {"precisions": ("w4a8", "w2a8", "w8a8"), "target": "onnxruntime"}


@pytest.fixture(scope="session")
def subject_of(
    plan_of: Callable[..., Subject],
    conv_graph: fx.GraphModule,
    resnet_graph: fx.GraphModule,
    bert_graph: fx.GraphModule,
    vit: nn.Module,
    resnet_batches: list,
    token_batches: list,
) -> Callable[[str], Subject]:
    """A planned graph by name, made once; batches have different sizes."""
    pictures = [draw(3, 3, 16, 16, seed=1), draw(5, 3, 16, 16, seed=2)]
    vit_batches = [{"pixel_values": batch} for batch in pictures]
    generator = torch.Generator().manual_seed(3)
    ids = [torch.randint(12, (n, 7), generator=generator) for n in (4, 2)]
    pairs = [(draw(8, 6, seed=4), draw(8, 6, seed=5)), (draw(3, 6, seed=6), draw(3, 6, seed=7))]
    torch.manual_seed(8)
    tied, two_inputs = Tied(), TwoInputs()
    made: dict[str, Subject] = {}

    def find(name: str) -> Subject:
        models: dict[str, tuple[nn.Module, list]] = {
            "conv": (conv_graph, pictures),
            "resnet": (resnet_graph, resnet_batches),
            "bert": (bert_graph, token_batches),
            "vit": (vit, vit_batches),
            "tied": (tied, ids),
            "two_inputs": (two_inputs, pairs),
        }
        if name not in made:
            model, batches = models[name.removesuffix("_onnxruntime")]
            made[name] = plan_of(model, batches, **(ORT if name.endswith("runtime") else {}))
        return made[name]

    return find


@pytest.fixture(scope="session", params=NAMES)
def subject(request: pytest.FixtureRequest, subject_of: Callable[[str], Subject]) -> Subject:
    """Every planned graph in turn."""
    return subject_of(request.param)


@pytest.fixture(scope="session")
def values_of() -> Callable[[fx.GraphModule, object], dict[str, object]]:
    """Every node's value in one batch, by name, as the graph itself computes it."""

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            self.found[n.name] = super().run_node(n)
            return self.found[n.name]

    def record(graph: fx.GraphModule, batch: object) -> dict[str, object]:
        recorder = Recorder(graph)
        recorder.found = {}
        with torch.no_grad():
            recorder.run(*flat_inputs(graph, batch), enable_io_processing=False)
        return recorder.found

    return record


RAN: list[str] = []


def move(view: LayerView, seed: int) -> list[float]:
    """Move codes at random, by a seed from what the layer reads; other scales and biases too."""
    RAN.append(f"{view.layer.name} {view.number_format.name}")
    before, found, quantizer = view.error(), view.number_format, view.quantizer
    mean = float(view.input(0).float().mean() * 1e6)
    generator = torch.Generator().manual_seed(seed + int(mean))
    codes = quantizer.codes(view.weight, found)
    moved = codes + torch.randint(-1, 2, codes.shape, generator=generator)
    quantizer.set_codes(found, moved.clamp(found.qmin, found.qmax))
    quantizer.set_scale(found, quantizer.scale(found) * 1.25)
    if view.correction is not None:
        view.set_bias(torch.full((len(view.weight),), 0.125))
    return [before, view.error()]


def flip(
    graph: fx.GraphModule, batches: list, *, units: Units, seed: int = 0, where: str = ""
) -> list[Refinement]:
    """Stands for a method that rounds."""
    done = []
    for view in Walk(graph, batches).layers():
        if view.is_first and where in view.layer.name and view.number_format.is_integer:
            work = partial(move, view, seed)
            numbers = units.unit(view.layer.name, graph, view.modules, work)
            done.append(Refinement("flip", view.layer.name, *numbers))
    return done


def widen(graph: fx.GraphModule, batches: list, *, units: Units) -> list[Refinement]:
    """Stands for a method that needs a plan: doubles the ranges."""
    for module in graph.modules():
        if isinstance(module, ActivationQuantizer) and module.active is not None:
            found = module.ranges[module.active.name]
            module.ranges[module.active.name] = type(found)(found.scale * 2, found.zero_point)
    return [Refinement("widen", "", 0.25, 0.5)]


def train(graph: fx.GraphModule, batches: list, *, units: Units, loss: Any) -> list[Refinement]:
    """Stands for a method that takes labels."""
    assert all(len(batch) == 2 for batch in batches)
    return [Refinement("train", "", 1.0, float(loss(graph, batches[0])))]


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Methods that note what they did in `RAN`."""
    RAN.clear()
    monkeypatch.setitem(METHODS, "flip", Method(flip, rounds=True))
    monkeypatch.setitem(METHODS, "widen", Method(widen))
    monkeypatch.setitem(METHODS, "train", Method(train, trains=True))
    monkeypatch.setitem(RECIPES, "flip and widen", ("flip", "widen"))


def refine(graph: fx.GraphModule, plan: Any, batches: Any, method: str, **rest: Any) -> Any:
    return fxmpq.refine(graph, plan, batches, method=method, progress=False, **rest)


def contents(graph: fx.GraphModule) -> dict[str, Any]:
    found: dict[str, Any] = {name: t.clone() for name, t in graph.state_dict().items()}
    for name, module in graph.named_modules():
        if isinstance(module, ActivationQuantizer):
            found[name] = (dict(module.ranges), module.active)
        elif isinstance(module, (WeightQuantizer, BiasCorrection)):
            found[name] = module.active
    return found


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        same = torch.equal(value, other[name]) if isinstance(value, Tensor) else None
        assert (value == other[name]) if same is None else same, name


@pytest.fixture
def conv(subject_of: Callable[[str], Subject]) -> Subject:
    return subject_of("conv")


@pytest.fixture
def choices(conv: Subject) -> dict[str, str]:
    return dict(require(conv.planned, stage="calibrated").choices)


def run_adaquant(graph: fx.GraphModule, batches: list, **options: Any) -> list[Refinement]:
    with torch.no_grad():
        return adaquant(graph, batches, units=options.pop("units", Units()), **options)


def state(graph: fx.GraphModule) -> dict[str, list[float]]:
    return {
        f"{node.target}/{leaf}": tensor.double().flatten().tolist()
        for node in graph.graph.nodes
        if node.op == "call_module"
        for leaf, tensor in quantizer_tensors(graph.get_submodule(str(node.target))).items()
    }
