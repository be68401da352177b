from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from fxmpq.graph.fusions import FoundFusions, find_fusions
from fxmpq.graph.layers import find_layers
from fxmpq.graph.trace import trace
from fxmpq.graph.vocabulary import operator_name
from fxmpq.recipes.models.resnet20 import ResNet20

RESIDUAL = (("conv", "relu"), ("conv", "add", "relu"), ("conv", "add"))


def fusions_of(graph: fx.GraphModule, *chains: tuple[str, ...]) -> FoundFusions:
    return find_fusions(graph, find_layers(graph).layers, chains)


def named(found: FoundFusions) -> dict[str, str]:
    """What each layer begins."""
    return {fusion.layer: fusion.name for fusion in found.fusions}


def reasons(found: FoundFusions) -> dict[tuple[str, str], str]:
    return {(entry.place, entry.rule): entry.reason for entry in found.missed}


def test_a_layer_and_its_activation(conv_graph: fx.GraphModule) -> None:
    found = fusions_of(conv_graph, ("conv", "relu"))
    assert named(found) == {"stem.0": "conv-relu", "conv1": "conv-relu"}
    assert reasons(found) == {
        ("conv2", "conv-relu"): "its output is read by add_",
        ("downsample.0", "conv-relu"): "its output is read by add_",
    }


def test_the_longest_chain_goes_first_and_the_last_layer_takes_the_add(
    conv_graph: fx.GraphModule,
) -> None:
    found = fusions_of(conv_graph, *RESIDUAL)
    # The downsample comes last in the graph: the main path's output waits for it.
    assert named(found) == {
        "stem.0": "conv-relu",
        "conv1": "conv-relu",
        "downsample.0": "conv-add-relu",
    }
    assert reasons(found)["conv2", "conv-add-relu"] == "its add is fused with downsample.0"
    assert reasons(found)["conv2", "conv-add"] == "its add is fused with downsample.0"
    assert not any(place == "conv1" for place, _ in reasons(found))
    fused = next(fusion for fusion in found.fusions if fusion.name == "conv-add-relu")
    assert fused.nodes == ("conv2d_3", "add_", "relu__1")


def test_a_reason_names_the_step_where_a_chain_ends(conv_graph: fx.GraphModule) -> None:
    found = fusions_of(conv_graph, ("conv", "relu", "conv"), ("conv", "relu", "linear"))
    assert named(found) == {"conv1": "conv-relu-conv"}
    missed = reasons(found)
    pooled = "its relu's result is read by pool.max_pool2d"
    assert missed["stem.0", "conv-relu-conv"] == missed["stem.0", "conv-relu-linear"] == pooled
    # The second convolution is taken, and begins no chain of its own.
    assert not any(place == "conv2" for place, _ in missed)


def test_an_add_may_begin_a_fusion(conv_graph: fx.GraphModule) -> None:
    found = fusions_of(conv_graph, ("add", "relu"))
    assert [(fusion.name, fusion.layer) for fusion in found.fusions] == [("add-relu", "")]
    # Only layers are told why a rule did not fire.
    assert fusions_of(conv_graph, ("add", "gelu")) == FoundFusions((), ())


def test_linear_and_gelu(bert_graph: fx.GraphModule) -> None:
    found = fusions_of(bert_graph, ("linear", "gelu"), ("linear", "tanh"))
    layer = "bert.encoder.layer.{}.intermediate.dense"
    assert named(found) == {
        layer.format(0): "linear-gelu",
        layer.format(1): "linear-gelu",
        "bert.pooler.dense": "linear-tanh",
    }
    missed = reasons(found)
    assert missed["classifier", "linear-gelu"] == "its output is the model's"


class Odd(nn.Module):
    """Chains that only look like fusions."""

    def __init__(self) -> None:
        super().__init__()
        self.two_readers = nn.Linear(4, 4)
        self.number = nn.Linear(4, 4)
        self.itself = nn.Linear(4, 4)
        self.broadcast = nn.Linear(4, 4)
        self.condition = nn.Linear(4, 4)
        self.fires = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> list[Tensor]:
        y = self.two_readers(x)
        itself = self.itself(x)
        return [
            torch.relu(y) * y,
            self.number(x) + 1,
            itself + itself,
            self.broadcast(x) + x[:, :1],
            torch.where(x > 0, x, self.condition(x)),
            torch.relu(self.fires(x)),
        ]


def test_every_layer_that_is_in_no_fusion_is_told_why() -> None:
    graph = trace(Odd(), torch.randn(2, 4))
    found = fusions_of(graph, ("linear", "relu"), ("linear", "add"), ("linear", "where"))
    assert named(found) == {"fires": "linear-relu"}
    missed = reasons(found)
    assert missed["two_readers", "linear-relu"] == "its output has 2 readers: relu, mul"
    assert missed["number", "linear-add"] == "the other operand of its add is no other tensor"
    assert missed["itself", "linear-add"] == "the other operand of its add is no other tensor"
    assert missed["broadcast", "linear-add"] == "the operands of its add have different shapes"
    assert missed["condition", "linear-where"] == "its output is not what its where works on"
    layers = {layer.name for layer in find_layers(graph).layers} - {"fires"}
    assert set(missed) == {
        (name, rule) for name in layers for rule in ("linear-relu", "linear-add", "linear-where")
    }


@pytest.mark.parametrize("order", [RESIDUAL, tuple(reversed(RESIDUAL))])
def test_resnet20_fuses_every_convolution(order: tuple[tuple[str, ...], ...]) -> None:
    graph = trace(ResNet20().eval(), torch.randn(2, 1, 28, 28))
    names = list(named(fusions_of(graph, *order)).values())
    # 9 blocks, a stem; of a block's last ones a shortcut is fused or waits.
    assert {name: names.count(name) for name in names} == {"conv-relu": 10, "conv-add-relu": 9}


@given(st.lists(st.sampled_from(["relu", "add", "max_pool2d", "conv"]), min_size=1, max_size=3))
def test_fusions_are_chains_of_single_readers(rest: list[str]) -> None:
    graph = GRAPH
    found = fusions_of(graph, ("conv", *rest), *RESIDUAL)
    nodes = {node.name: node for node in graph.graph.nodes}
    members = [name for fusion in found.fusions for name in fusion.nodes]
    assert len(members) == len(set(members))
    for fusion in found.fusions:
        chain = [nodes[name] for name in fusion.nodes]
        assert "-".join(str(operator_name(node)) for node in chain) == fusion.name
        for one, other in pairwise(chain):
            assert list(one.users) == [other]
    # Each layer is in a fusion's beginning or has a reason for every rule of its kind.
    begins = {fusion.layer for fusion in found.fusions}
    inside = set(members)
    for layer in find_layers(graph).layers:
        if layer.kind == "conv" and layer.node not in inside:
            assert any(entry.place == layer.name for entry in found.missed)
        assert not (layer.name in begins and any(e.place == layer.name for e in found.missed))


GRAPH = trace(ResNet20().eval(), torch.randn(2, 1, 28, 28))
