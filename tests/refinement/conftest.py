"""Planned graphs of many shapes, with batches of different sizes, for the tests of refinement."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, fx, nn
from transformers import ViTConfig, ViTForImageClassification

from fxmpq.formats import Precision
from fxmpq.graph.batches import flat_inputs
from fxmpq.graph.state import require
from fxmpq.graph.switch import with_choices
from fxmpq.graph.trace import trace


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
