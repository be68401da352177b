from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, fx, nn

from fxmpq.formats import Precision
from fxmpq.graph.state import node_shape
from fxmpq.graph.trace import trace
from fxmpq.recipes.models.resnet20 import ResNet20
from fxmpq.targets.onnxruntime import ONNXRUNTIME
from fxmpq.targets.reference import REFERENCE
from fxmpq.targets.registry import get_target

from .conftest import sites_of, symmetric_of


def test_the_reference_quantizes_what_layers_read(conv_graph: fx.GraphModule) -> None:
    assert sites_of(conv_graph, REFERENCE.rules) == {
        "x": ("stem.0", {"conv2d"}),
        "max_pool2d": ("conv1", {"conv2d_1", "conv2d_3"}),
        "relu": ("conv2", {"conv2d_2"}),
        "mean": ("fc", {"linear"}),
    }


def test_excluding_a_reader_leaves_its_input_alone(conv_graph: fx.GraphModule) -> None:
    found = sites_of(conv_graph, REFERENCE.rules, exclude=("conv1",))
    assert found["max_pool2d"] == ("downsample.0", {"conv2d_3"})


def test_weight_only_quantizes_no_activation(conv_graph: fx.GraphModule) -> None:
    assert sites_of(conv_graph, REFERENCE.rules, candidate=Precision(4)) == {}


def test_linear_layers_read_shared_inputs_once(bert_graph: fx.GraphModule) -> None:
    found = sites_of(bert_graph, ONNXRUNTIME.rules)
    query = "bert.encoder.layer.0.attention.self.query"
    ((value, readers),) = [(v, r) for v, (group, r) in found.items() if group == query]
    assert readers is not None
    assert len(readers) == 3
    # An embedding reads indices, which are no activation: 4 sites a layer, pooler, classifier.
    assert len(found) == 2 * 4 + 2
    assert value.startswith("layer_norm")


@pytest.mark.parametrize("target", [REFERENCE, ONNXRUNTIME])
def test_every_site_is_a_real_tensor(resnet_graph: fx.GraphModule, target: object) -> None:
    nodes = {node.name: node for node in resnet_graph.graph.nodes}
    found = sites_of(resnet_graph, target.rules)  # type: ignore[attr-defined]
    assert found
    for name in found:
        assert nodes[name].meta["val"].is_floating_point()
        assert node_shape(nodes[name]) is not None


# Counted before fusions were data, as (sites, sites that every reader sees in codes).
RECORDED = {
    ("resnet20", "reference"): (20, 0),
    ("resnet20", "onnxruntime"): (32, 30),
    ("conv", "reference"): (4, 0),
    ("conv", "onnxruntime"): (7, 5),
    ("bert", "reference"): (10, 0),
    ("bert", "onnxruntime"): (10, 0),
}


@pytest.mark.parametrize(("model", "target"), RECORDED)
def test_sites_are_where_they_always_were(
    conv_graph: fx.GraphModule, bert_graph: fx.GraphModule, model: str, target: str
) -> None:
    if model == "resnet20":
        graph = trace(ResNet20().eval(), torch.randn(2, 1, 28, 28))
    else:
        graph = {"conv": conv_graph, "bert": bert_graph}[model]
    found = sites_of(graph, get_target(target).rules)
    stored = [readers for _, readers in found.values() if readers is None]
    assert (len(found), len(stored)) == RECORDED[model, target]
    if (model, target) == ("resnet20", "onnxruntime"):
        by_group: dict[str, str] = {}
        for value, (group, _) in found.items():
            by_group[group] = f"{by_group.get(group, '')} {value}".lstrip()
        assert by_group == RESNET20_CODES
        # Only the image and what the classifier reads are in float for other readers.
        assert [name for name, (_, readers) in found.items() if readers] == ["x", "flatten"]


RESNET20_CODES = {
    "conv": "x",
    "stage1.0.conv1": "relu",
    "stage1.0.conv2": "relu_1 conv2d_2",
    "stage1.1.conv1": "relu_2",
    "stage1.1.conv2": "relu_3 conv2d_4",
    "stage1.2.conv1": "relu_4",
    "stage1.2.conv2": "relu_5 conv2d_6",
    "stage2.0.conv1": "relu_6 conv2d_9",
    "stage2.0.conv2": "relu_7 conv2d_8",
    "stage2.1.conv1": "relu_8",
    "stage2.1.conv2": "relu_9 conv2d_11",
    "stage2.2.conv1": "relu_10",
    "stage2.2.conv2": "relu_11 conv2d_13",
    "stage3.0.conv1": "relu_12 conv2d_16",
    "stage3.0.conv2": "relu_13 conv2d_15",
    "stage3.1.conv1": "relu_14",
    "stage3.1.conv2": "relu_15 conv2d_18",
    "stage3.2.conv1": "relu_16",
    "stage3.2.conv2": "relu_17 conv2d_20 relu_18",
    "classifier": "flatten",
}


def test_what_kinds_with_symmetric_inputs_read_is_symmetric(conv_graph: fx.GraphModule) -> None:
    convolved = {"x", "max_pool2d", "relu"}
    assert symmetric_of(conv_graph, REFERENCE.rules) == set()
    assert symmetric_of(conv_graph, REFERENCE.rules, "conv") == convolved
    assert symmetric_of(conv_graph, REFERENCE.rules, "linear") == {"mean"}
    assert symmetric_of(conv_graph, REFERENCE.rules, "conv", "linear") == {*convolved, "mean"}
    # It moves up past the max pooling, and stored outputs are read in codes too.
    assert symmetric_of(conv_graph, ONNXRUNTIME.rules, "conv") == {"x", "relu_", "relu"}
    assert symmetric_of(conv_graph, ONNXRUNTIME.rules, "add") == {"conv2d_2", "conv2d_3"}


class Turned(nn.Module):
    """A linear layer on the columns of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.transpose(1, 2))


@pytest.mark.parametrize(("precision", "stored"), [("w8a8d", "x"), ("w8a8dt", "transpose")])
def test_rows_of_which_ranges_are_found_are_those_of_the_layer(precision: str, stored: str) -> None:
    """Of the tensor in front of a transpose they would be what the layer adds up."""
    graph = trace(Turned().eval(), torch.randn(2, 3, 4))
    rules = replace(REFERENCE.rules, through=frozenset({torch.ops.aten.transpose.int}))
    assert set(sites_of(graph, rules, candidate=Precision.parse("w8a8"))) == {"x"}
    assert set(sites_of(graph, rules, candidate=Precision.parse(precision))) == {stored}
