"""Units and junctions of a prepared graph."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

import fxmpq
from fxmpq.costs.latency.cut import cut
from fxmpq.costs.latency.places import find_junctions, find_units
from fxmpq.graph.layers import find_layers
from fxmpq.graph.state import state_of
from fxmpq.targets.inductor import INDUCTOR
from fxmpq.targets.onnxruntime import ONNXRUNTIME
from fxmpq.targets.openvino import OPENVINO
from fxmpq.targets.target import Target


class Block(nn.Module):
    """A pooled stem and a residual block whose sum a layer reads."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 3, 3, padding=1)
        self.one = nn.Conv2d(3, 3, 1)
        self.two = nn.Conv2d(3, 3, 1)
        self.last = nn.Conv2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.max_pool2d(torch.relu(self.stem(x)), 2)
        y = self.two(torch.relu(self.one(x)))
        return self.last(torch.relu(y + x))


def _prepared(model: nn.Module, target: Target, *shape: int) -> fx.GraphModule:
    torch.manual_seed(0)
    graph = fxmpq.trace(model.eval(), torch.randn(*shape))
    return fxmpq.prepare(graph, target, candidates=["w8a8", "fp32"])


def _found(graph: fx.GraphModule, target: Target) -> dict[tuple[str, str, str], tuple[str, ...]]:
    junctions = find_junctions(graph, find_units(state_of(graph)), target.rules)
    return {(j.producer.member.name, j.reader.member.name, j.read_by): j.between for j in junctions}


def test_units_are_layers_with_what_is_fused_to_them() -> None:
    names = [unit.nodes for unit in find_units(state_of(_prepared(Block(), OPENVINO, 2, 2, 8, 8)))]
    assert names == [
        ("conv2d", "relu"),
        ("conv2d_1", "relu_1"),
        ("conv2d_2", "add", "relu_2"),
        ("conv2d_3",),
    ]


def test_junctions_lead_past_poolings_and_sums() -> None:
    graph = _prepared(Block(), ONNXRUNTIME, 2, 2, 8, 8)
    assert _found(graph, ONNXRUNTIME) == {
        ("stem", "one", "conv2d_1"): ("max_pool2d",),
        ("one", "two", "conv2d_2"): (),
        ("two", "last", "conv2d_3"): ("add", "relu_2"),
        ("stem", "last", "conv2d_3"): ("max_pool2d", "add", "relu_2"),
    }


@pytest.mark.parametrize("target", [OPENVINO, INDUCTOR])
def test_a_sum_fused_to_its_layer_is_the_layers(target: Target) -> None:
    graph = _prepared(Block(), target, 2, 2, 8, 8)
    assert _found(graph, target) == {
        ("stem", "one", "conv2d_1"): ("max_pool2d",),
        ("one", "two", "conv2d_2"): (),
        ("two", "last", "conv2d_3"): (),
        # What is added comes from a layer too.
        ("stem", "two", "add"): ("max_pool2d",),
    }


class Twice(Block):
    """What a layer reads is added to its result too."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        return self.last(torch.relu(self.one(x) + x))


class Later(Block):
    """What is added to a layer's result is computed after it, and returned as well."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.relu(self.stem(x))
        y, added = self.two(torch.relu(x)), self.one(x)
        return torch.relu(y + added), added


def test_a_tensor_that_is_read_and_added_is_one_junction() -> None:
    assert _found(_prepared(Twice(), OPENVINO, 2, 2, 8, 8), OPENVINO) == {
        ("stem", "one", "conv2d_1"): (),
        ("one", "last", "conv2d_2"): (),
    }


def test_precisions_are_named_in_the_order_of_layers() -> None:
    graph = _prepared(Later(), OPENVINO, 2, 2, 8, 8)
    found = {
        (junction.producer.member.name, junction.reader.member.name): junction
        for junction in find_junctions(graph, find_units(state_of(graph)), OPENVINO.rules)
    }
    assert found["stem", "one"].in_graph_order("w8a8", "fp32") == ("w8a8", "fp32")
    added = found["one", "two"]
    assert added.in_graph_order("w8a8", "fp32") == ("fp32", "w8a8")
    piece = cut(graph, added.nodes, added.reader.nodes[-1])
    names = [layer.name for layer in find_layers(fxmpq.trace(piece.module, piece.inputs)).layers]
    assert [name.split("_")[2] for name in names] == ["two", "one"]


def test_a_junction_is_cut_from_producer_to_reader() -> None:
    graph = _prepared(Block(), ONNXRUNTIME, 2, 2, 8, 8)
    units = find_units(state_of(graph))
    found = find_junctions(graph, units, ONNXRUNTIME.rules)
    assert found[0].nodes == ("conv2d", "relu", "max_pool2d", "conv2d_1", "relu_1")


def test_where_something_lies_between_there_are_none() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4))
    graph = _prepared(net, ONNXRUNTIME, 2, 4)
    assert _found(graph, ONNXRUNTIME) == {}
    assert len(find_units(state_of(graph))) == 2
