from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from fxmpq.graph.prepare import insert_quantizers
from fxmpq.graph.trace import trace
from fxmpq.refinement.scalable_pairs import channel_dimension, find_pairs
from fxmpq.targets.registry import get_target


def pairs(model: nn.Module, shape: tuple[int, ...], target: str = "reference") -> list:
    graph = insert_quantizers(trace(model.eval(), torch.zeros(2, *shape)), get_target(target).rules)
    return [(pair.first.name, pair.second.name) for pair in find_pairs(graph)]


def between(*modules: nn.Module, channels: int = 4) -> nn.Sequential:
    """Something between two convolutions, named 0 and last."""
    return nn.Sequential(nn.Conv2d(2, channels, 3), *modules, nn.Conv2d(channels, 3, 1))


class Function(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


HOMOGENEOUS = {
    "nothing": nn.Identity(),
    "relu": nn.ReLU(),
    "leaky relu": nn.LeakyReLU(0.2),
    "max pooling": nn.MaxPool2d(2, padding=1),
    "average pooling": nn.AvgPool2d(2, padding=1),
    "adaptive pooling": nn.AdaptiveAvgPool2d(2),
    "zero padding": nn.ZeroPad2d(1),
    "dropout": nn.Dropout(),
    "a mean that keeps its dimension": Function(lambda x: x.mean(3, keepdim=True)),
    "a reshape of positions": Function(lambda x: x.flatten(2).unsqueeze(3)),
}

OTHERS = {
    "gelu": nn.GELU(),
    "silu": nn.SiLU(),
    "relu6": nn.ReLU6(),
    "sigmoid": nn.Sigmoid(),
    "reflection padding": nn.ReflectionPad2d(1),
    "padding with ones": nn.ConstantPad2d(1, 1.0),
    "padding of channels": Function(lambda x: functional.pad(x, (0, 0, 0, 0, 1, 1))[:, 1:-1]),
    "a mean over channels": Function(lambda x: x.mean(1, keepdim=True).expand(-1, 4, -1, -1)),
    "another reader": Function(lambda x: x + x.relu()),
    "a shuffle": Function(lambda x: functional.pixel_shuffle(x, 2).repeat(1, 4, 1, 1)),
    "a norm": nn.LayerNorm(6, elementwise_affine=False),
    "a constant": Function(lambda x: x + 1),
    "swapped dimensions": Function(lambda x: x.transpose(1, 2)[:, :4]),
    "a transposed convolution": nn.ConvTranspose2d(4, 4, 1),
    "a reshape that mixes channels": Function(lambda x: x.reshape(-1, 4, 6, 6) + 0),
}


@pytest.mark.parametrize("target", ["reference", "onnxruntime"])
@pytest.mark.parametrize("name", HOMOGENEOUS)
def test_what_commutes_with_scaling_may_lie_between(name: str, target: str) -> None:
    model = between(HOMOGENEOUS[name])
    assert pairs(model, (2, 8, 8), target) == [("0", "2")]


@pytest.mark.parametrize("name", OTHERS)
def test_nothing_else_may(name: str) -> None:
    assert pairs(between(OTHERS[name]), (2, 8, 8)) == []


def test_chains_and_depthwise_convolutions_are_pairs_in_turn() -> None:
    model = between(nn.ReLU(), nn.Conv2d(4, 4, 3, groups=4, bias=False), nn.ReLU(), nn.MaxPool2d(2))
    assert pairs(model, (2, 12, 12)) == [("0", "2"), ("2", "5")]


@pytest.mark.parametrize(
    "pool", [nn.Flatten(), nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())]
)
def test_a_classifier_reads_channels_behind_a_flattening(pool: nn.Module) -> None:
    flat = pool(torch.zeros(1, 4, 6, 6)).shape[1]
    model = nn.Sequential(nn.Conv2d(2, 4, 3), pool, nn.Linear(flat, 5))
    assert pairs(model, (2, 8, 8)) == [("0", "2")]


def test_a_mean_over_positions_leads_to_a_classifier() -> None:
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), Function(lambda x: x.relu().mean((2, 3))), nn.Linear(4, 5)
    )
    assert pairs(model, (2, 8, 8)) == [("0", "2")]


def test_linear_layers_have_their_channels_last() -> None:
    layers = [nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 6)]
    assert pairs(nn.Sequential(*layers), (3, 4)) == [("0", "2")]
    turned = Function(lambda x: x.transpose(1, 2))
    assert pairs(nn.Sequential(layers[0], turned, nn.Linear(3, 6)), (3, 4)) == []
    # A linear layer over the rows of a convolution's output mixes no channels.
    model = nn.Sequential(nn.Conv1d(4, 4, 1), nn.Linear(3, 3))
    assert pairs(model, (4, 3)) == []


class Tied(nn.Module):
    def __init__(self, *, bias: bool) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        if bias:
            self.c.bias = self.a.bias
        else:
            self.c.weight = self.b.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x).relu()).relu())


class Computed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(functional.linear(x, self.a.weight, self.a.bias * x.mean()).relu())


class Read(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.a(x).relu()
        return self.b(x), x


def test_what_is_read_elsewhere_is_not_scaled() -> None:
    assert pairs(Tied(bias=False), (4,)) == []
    assert pairs(Tied(bias=True), (4,)) == [("b", "c")]
    assert pairs(Computed(), (4,)) == []
    assert pairs(Read(), (4,)) == []


def test_a_pair_names_the_bias_it_scales(conv_graph: fx.GraphModule) -> None:
    graph = insert_quantizers(conv_graph, get_target("reference").rules)
    found = find_pairs(graph)
    assert [(pair.first.name, pair.second.name) for pair in found] == [("conv1", "conv2")]
    assert graph.get_parameter(found[0].bias).shape == (16,)
    bare = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 2))
    graph = insert_quantizers(trace(bare, torch.zeros(2, 3)), get_target("reference").rules)
    assert [pair.bias for pair in find_pairs(graph)] == [None]


def test_the_channel_dimension_counts_from_the_positions(conv_graph: fx.GraphModule) -> None:
    graph = insert_quantizers(conv_graph, get_target("reference").rules)
    pair = find_pairs(graph)[0]
    assert channel_dimension(pair.first, 4) == 1
    assert channel_dimension(pair.first, 3) == 0
