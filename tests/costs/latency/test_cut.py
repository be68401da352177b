"""Pieces cut out of a graph."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

import fxmpq
from fxmpq.costs.latency.cut import Piece, behind_quantizers, cut


def _graph(model: nn.Module, *shape: int) -> fx.GraphModule:
    torch.manual_seed(0)
    return fxmpq.trace(model.eval(), torch.randn(*shape))


def _cut(graph: fx.GraphModule, *names: str) -> Piece:
    return cut(graph, names, names[-1])


def test_a_piece_computes_what_its_nodes_do() -> None:
    graph = _graph(nn.Sequential(nn.Conv2d(2, 3, 3, stride=2), nn.ReLU(), nn.Flatten()), 2, 2, 9, 9)
    piece = _cut(graph, "conv2d", "relu")
    (x,) = piece.inputs
    convolution = graph.get_submodule("0")
    expected = torch.relu(
        nn.functional.conv2d(x, convolution.weight, convolution.bias, stride=2)  # type: ignore[arg-type]
    )
    assert torch.equal(piece.module(x), expected)
    assert x.shape == (1, 2, 9, 9)


def test_what_is_read_from_elsewhere_becomes_an_input() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return x.tanh() + self.inner(x)

    graph = _graph(Sum(), 3, 4)
    piece = _cut(graph, "linear", "add")
    assert [tuple(x.shape) for x in piece.inputs] == [(1, 4), (1, 4)]
    first, second = piece.inputs
    inner = nn.functional.linear(first, graph.get_parameter("inner.weight"))
    inner = inner + graph.get_parameter("inner.bias")
    assert torch.allclose(piece.module(first, second), second + inner)


def test_quantizers_are_left_out() -> None:
    graph = _graph(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2, bias=False)), 2, 4)
    prepared = fxmpq.prepare(graph, "reference")
    assert _cut(prepared, "linear").signature == _cut(graph, "linear").signature
    nodes = {node.name: node for node in prepared.graph.nodes}
    assert behind_quantizers(prepared, nodes["linear_1"].args[2]) is None
    node = nodes["linear"]
    source = behind_quantizers(prepared, node.args[1])
    assert isinstance(source, fx.Node)
    assert source.op == "get_attr"


def test_pieces_are_alike_whatever_their_weights() -> None:
    graph = _graph(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)), 2, 4)
    first, second, other = (_cut(graph, f"linear{end}") for end in ("", "_1", "_2"))
    assert first.signature == second.signature != other.signature


@pytest.mark.parametrize(
    "other", [nn.Conv2d(2, 3, 3, stride=2), nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(2, 3, 1)]
)
def test_and_differ_in_their_options(other: nn.Module) -> None:
    one, two = (_graph(net, 2, 2, 8, 8) for net in (nn.Conv2d(2, 3, 3), other))
    assert _cut(one, "conv2d").signature != _cut(two, "conv2d").signature


def test_and_in_the_shapes_that_they_read() -> None:
    net = nn.Conv2d(2, 3, 3)
    one, two = (_graph(net, 2, 2, size, size) for size in (8, 9))
    assert _cut(one, "conv2d").signature != _cut(two, "conv2d").signature


def test_indices_are_drawn_from_the_table() -> None:
    graph = fxmpq.trace(nn.Embedding(5, 4), torch.zeros(2, 50, dtype=torch.long))
    piece = _cut(graph, "embedding")
    (indices,) = piece.inputs
    assert indices.shape == (1, 50)
    assert set(indices.flatten().tolist()) == set(range(5))
    assert piece.module(indices).shape == (1, 50, 4)


def test_inputs_have_the_same_bits_every_time() -> None:
    graph = _graph(nn.Linear(4, 4), 2, 4)
    assert torch.equal(_cut(graph, "linear").inputs[0], _cut(graph, "linear").inputs[0])


class Shifted(nn.Module):
    """A sum of samples with what they share."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv2d(2, 4, 1)
        self.shift = nn.Parameter(torch.ones(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + self.shift * x.amax()


@pytest.mark.parametrize("samples", [2, 3])
def test_what_samples_share_is_left_whole(samples: int) -> None:
    piece = _cut(_graph(Shifted(), samples, 2, 5, 5), "conv2d", "add")
    assert [tuple(x.shape) for x in piece.inputs] == [(1, 2, 5, 5), (4, 1, 1)]
    assert piece.module(*piece.inputs).shape == (1, 4, 5, 5)


def test_samples_may_come_second() -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x.transpose(0, 1).relu())

    assert _cut(_graph(Turned(), 2, 6, 4), "linear").inputs[0].shape == (6, 1, 4)


def test_tokens_that_are_flattened_into_samples_are_all_of_one_sample() -> None:
    net = nn.Sequential(nn.Flatten(0, 1), nn.Linear(4, 3))
    assert _cut(_graph(net, 2, 6, 4), "linear").inputs[0].shape == (6, 4)
