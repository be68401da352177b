from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

from fxmpq.formats import Precision
from fxmpq.graph.groups import form_groups
from fxmpq.graph.layers import find_layers
from fxmpq.graph.rules import TargetRules
from fxmpq.graph.sites import find_sites
from fxmpq.graph.state import node_shape
from fxmpq.graph.trace import trace
from fxmpq.targets.onnxruntime import ONNXRUNTIME
from fxmpq.targets.reference import REFERENCE

Found = dict[str, tuple[str, set[str] | None]]


def sites_of(
    graph: fx.GraphModule,
    rules: TargetRules,
    exclude: tuple[str, ...] = (),
    candidate: Precision = Precision(8, 8),
) -> Found:
    """Value to (owning group, readers)."""
    groups = form_groups(graph, find_layers(graph).layers, rules, [candidate], {}, exclude)
    sites = find_sites(graph, groups, rules)
    order = [node.name for node in graph.graph.nodes]
    assert [site.value.name for site in sites] == sorted(
        (site.value.name for site in sites), key=order.index
    )
    return {
        site.value.name: (
            site.group,
            None if site.readers is None else {reader.name for reader in site.readers},
        )
        for site in sites
    }


def test_the_reference_quantizes_what_layers_read(conv_graph: fx.GraphModule) -> None:
    assert sites_of(conv_graph, REFERENCE.rules) == {
        "x": ("stem.0", {"conv2d"}),
        "max_pool2d": ("conv1", {"conv2d_1", "conv2d_3"}),
        "relu": ("conv2", {"conv2d_2"}),
        "mean": ("fc", {"linear"}),
    }


def test_onnxruntime_stores_what_convolutions_and_adds_write(conv_graph: fx.GraphModule) -> None:
    assert sites_of(conv_graph, ONNXRUNTIME.rules) == {
        "x": ("stem.0", {"conv2d"}),
        # The quantizer moves up past the max pooling, to the fused activation.
        "relu_": ("conv1", None),
        "relu": ("conv2", None),
        "conv2d_2": ("conv2", None),
        "conv2d_3": ("conv1", None),
        # The sum of stored tensors and its activation belong to the first that computes them.
        "relu__1": ("conv2", None),
        "mean": ("fc", {"linear"}),
    }


def test_an_excluded_convolution_keeps_its_neighbourhood_in_float(
    conv_graph: fx.GraphModule,
) -> None:
    found = sites_of(conv_graph, ONNXRUNTIME.rules, exclude=("conv2",))
    assert "conv2d_2" not in found
    assert "relu__1" not in found
    # The first convolution of the block still writes codes.
    assert found["relu"] == ("conv1", None)
    assert found["conv2d_3"] == ("conv1", None)


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


class Chain(nn.Module):
    """A residual chain whose identity is the sum of the block before."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.one = nn.Conv2d(4, 4, 3, padding=1)
        self.two = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = (self.one(x) + x).relu()
        x = self.two(x) + x
        return (x + 1).mean((2, 3))


def test_sums_of_stored_tensors_are_stored_in_turn() -> None:
    graph = trace(Chain(), torch.ones(2, 3, 8, 8))
    found = sites_of(graph, ONNXRUNTIME.rules)
    assert found == {
        "x": ("stem", {"conv2d"}),
        "relu": ("one", None),
        "conv2d_1": ("one", None),
        "relu_1": ("two", None),
        "conv2d_2": ("two", None),
        "add_1": ("two", None),
    }


def test_adding_a_constant_is_not_stored() -> None:
    graph = trace(Chain(), torch.ones(2, 3, 8, 8))
    assert "add_2" not in sites_of(graph, ONNXRUNTIME.rules)


@pytest.mark.parametrize("target", [REFERENCE, ONNXRUNTIME])
def test_every_site_is_a_real_tensor(resnet_graph: fx.GraphModule, target: object) -> None:
    nodes = {node.name: node for node in resnet_graph.graph.nodes}
    found = sites_of(resnet_graph, target.rules)  # type: ignore[attr-defined]
    assert found
    for name in found:
        assert nodes[name].meta["val"].is_floating_point()
        assert node_shape(nodes[name]) is not None
