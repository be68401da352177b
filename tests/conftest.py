"""Small models, batches and graphs that many test modules share."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from hypothesis import settings
from torch import Tensor, fx, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    ResNetConfig,
    ResNetForImageClassification,
)

from fxmpq.calibration.calibrate import calibrate
from fxmpq.formats import Precision
from fxmpq.graph.prepare import insert_quantizers
from fxmpq.graph.rules import OperatorRule, TargetRules
from fxmpq.graph.state import Refinement, require
from fxmpq.graph.switch import with_choices
from fxmpq.graph.trace import trace
from fxmpq.refinement.methods import METHODS, Method
from fxmpq.refinement.units import Units
from fxmpq.refinement.views import LayerView
from fxmpq.refinement.walk import Walk
from fxmpq.targets.registry import get_target

# OpenVINO reports its import over the network, except in continuous integration.
os.environ["CI"] = "true"
torch.set_num_threads(1)
settings.register_profile("fxmpq", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("fxmpq")


class ConvNet(nn.Module):
    """A stem with max pooling, one residual block with a downsample, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True)
        )
        self.pool = nn.MaxPool2d(2)
        self.conv1 = nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 16, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(16)
        self.downsample = nn.Sequential(
            nn.Conv2d(8, 16, 1, stride=2, bias=False), nn.BatchNorm2d(16)
        )
        self.dropout = nn.Dropout(0.5)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.stem(x))
        hidden = torch.relu(self.bn1(self.conv1(x)))
        hidden = self.bn2(self.conv2(hidden))
        hidden += self.downsample(x)
        hidden = torch.relu_(hidden)
        return self.fc(self.dropout(hidden.mean((2, 3))))


class TiedHead(nn.Module):
    """An embedding whose table is the output layer's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 4)
        self.head = nn.Linear(4, 9)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.table(ids))


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give norms weights and statistics that are not trivial; returns the model in eval mode."""
    generator = torch.Generator().manual_seed(seed)

    def draw(tensor: Tensor, low: float, high: float) -> None:
        tensor.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)

    with torch.no_grad():
        for module in model.modules():
            if not isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.LayerNorm)):
                continue
            if module.weight is not None:
                draw(module.weight, 0.5, 1.5)
                draw(module.bias, -0.5, 0.5)
            if getattr(module, "running_mean", None) is not None:
                draw(module.running_mean, -0.5, 0.5)
                draw(module.running_var, 0.5, 2.0)
    return model.eval()


@pytest.fixture(scope="session", name="randomize")
def randomize_fixture() -> Callable[..., nn.Module]:
    return randomize


@pytest.fixture(scope="session")
def conv_net() -> nn.Module:
    torch.manual_seed(1)
    return randomize(ConvNet())


@pytest.fixture(scope="session")
def tied_head() -> nn.Module:
    torch.manual_seed(6)
    return TiedHead()


@pytest.fixture(scope="session")
def images() -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(6, 3, 16, 16, generator=generator) for _ in range(2)]


@pytest.fixture(scope="session")
def resnet() -> nn.Module:
    """Transformers' ResNet, with one block a stage."""
    torch.manual_seed(3)
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], layer_type="basic", num_labels=5
    )
    return randomize(ResNetForImageClassification(config))


@pytest.fixture(scope="session")
def resnet_batches(images: list[Tensor]) -> list[dict[str, Tensor]]:
    larger = [nn.functional.interpolate(batch, scale_factor=2) for batch in images]
    return [{"pixel_values": batch} for batch in larger]


@pytest.fixture(scope="session")
def bert() -> nn.Module:
    """Transformers' BERT with two layers, weights larger than at initialisation."""
    torch.manual_seed(4)
    config = BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=12,
        num_labels=3,
        initializer_range=0.3,
    )
    return randomize(BertForSequenceClassification(config))


@pytest.fixture(scope="session")
def token_batches() -> list[dict[str, Tensor]]:
    """Two batches of different lengths; the last samples are padded."""
    generator = torch.Generator().manual_seed(5)
    batches = []
    for length in (8, 6):
        ids = torch.randint(1, 40, (4, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[-1, length // 2 :] = 0
        batches.append({"input_ids": ids, "attention_mask": mask})
    return batches


@pytest.fixture(scope="session")
def conv_graph(conv_net: nn.Module, images: list[Tensor]) -> fx.GraphModule:
    return trace(conv_net, images[0])


@pytest.fixture(scope="session")
def resnet_graph(resnet: nn.Module, resnet_batches: list[dict[str, Tensor]]) -> fx.GraphModule:
    return trace(resnet, resnet_batches[0])


@pytest.fixture(scope="session")
def bert_graph(bert: nn.Module, token_batches: list[dict[str, Tensor]]) -> fx.GraphModule:
    return trace(bert, token_batches[0])


@pytest.fixture(scope="session")
def chip_rules() -> TargetRules:
    """A chip that adds and concatenates codes of one scale only, and so ties what meets there."""
    widths = OperatorRule(frozenset({4, 8}), frozenset({4, 8}))
    return TargetRules(
        "chip",
        {"conv": widths, "linear": widths},
        (Precision(4, 8), Precision(8, 8)),
        quantize_outputs_of=frozenset({"conv", "add", "cat"}),
        fusions=(("conv", "relu"), ("add", "relu")),
        joins=("shared_weight", "shared_input", "added", "concatenated"),
        shared_ranges=frozenset({"add", "cat"}),
    )


Planned = Callable[..., fx.GraphModule]


@pytest.fixture(scope="session")
def calibrated() -> Planned:
    """Prepares and calibrates a traced graph: `calibrated(graph, batches, target, **options)`."""

    def make(
        graph: fx.GraphModule, batches: list, target: str = "reference", **options: object
    ) -> fx.GraphModule:
        prepared = insert_quantizers(graph, get_target(target).rules, **options)
        return calibrate(prepared, batches, progress=False)

    return make


@pytest.fixture(scope="session")
def uniform() -> Planned:
    """Sets every group of a calibrated graph to a candidate, the first by default."""

    def make(graph: fx.GraphModule, index: int = 0) -> fx.GraphModule:
        groups = require(graph, stage="calibrated").groups
        choices = {
            group.name: str(group.candidates[min(index, len(group.candidates) - 1)])
            for group in groups
        }
        return with_choices(graph, choices)

    return make


@pytest.fixture(scope="session")
def in_turn() -> Planned:
    """Sets the groups of a calibrated graph to their candidates in turn."""

    def make(graph: fx.GraphModule) -> fx.GraphModule:
        groups = require(graph, stage="calibrated").groups
        choices = {
            group.name: str(group.candidates[index % len(group.candidates)])
            for index, group in enumerate(groups)
        }
        return with_choices(graph, choices)

    return make


@pytest.fixture
def coarse_refinement(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Registers a refinement of two lines, `coarse`; the list tells the layers it was done to.

    Every code of a layer becomes the next smaller even one: that is easy to recognise.
    """
    done: list[str] = []

    def coarse(graph: fx.GraphModule, batches: list, *, units: Units) -> list[Refinement]:
        found = []
        for view in Walk(graph, batches).layers():

            def compute(view: LayerView = view) -> list[float]:
                done.append(view.layer.name)
                before = view.error()
                codes = view.quantizer.codes(view.weight, view.number_format)
                view.quantizer.set_codes(view.number_format, codes - codes.remainder(2))
                return [before, view.error()]

            numbers = units.unit(view.layer.name, graph, view.modules, compute)
            found.append(Refinement("coarse", view.layer.name, *numbers))
        return found

    monkeypatch.setitem(METHODS, "coarse", Method(coarse, rounds=True))
    return done
