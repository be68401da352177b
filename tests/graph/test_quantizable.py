from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

import fxmpq
from fxmpq.graph.quantizable import QuantizableGraph
from fxmpq.graph.state import copy_graph
from fxmpq.graph.trace import trace

META = torch.device("meta")


class Positions(nn.Module):
    """Makes tensors in each call, in the ways models do."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.register_buffer("offset", torch.ones(4), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.zeros(x.shape[0], 4, device=x.device).masked_fill(x > 0, 1.0)
        steps = torch.arange(4, device=x.device) + torch.tensor([1, 2, 3, 4])
        return self.fc(x) * mask + torch.ones_like(x) + steps + self.offset


class Chooses(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(
            x.sum() > 0, lambda y: y + torch.arange(4.0, device=y.device), torch.neg, (self.fc(x),)
        )


def devices(graph: fx.GraphModule) -> set[torch.device]:
    """Every device that a node of the graph, or of a branch of it, names."""
    found: set[torch.device] = set()

    def note(argument: object) -> object:
        if isinstance(argument, torch.device):
            found.add(argument)
        return argument

    for module in graph.modules():
        if isinstance(module, fx.GraphModule):
            for node in module.graph.nodes:
                fx.node.map_aggregate((node.args, node.kwargs), note)
    return found


@pytest.mark.parametrize("model", [Positions, Chooses])
def test_operators_that_make_tensors_follow_the_graph(model: Callable[[], nn.Module]) -> None:
    graph = trace(model(), torch.ones(2, 4))
    assert isinstance(graph, QuantizableGraph)
    assert devices(graph) == {torch.device("cpu")}
    moved = copy.deepcopy(graph).to(META)
    assert devices(moved) == {META}
    assert {tensor.device for tensor in moved.state_dict().values()} == {META}
    assert devices(graph) == {torch.device("cpu")}


def test_a_moved_graph_runs_there() -> None:
    graph = trace(Positions(), torch.ones(2, 4)).to(META)
    found = graph(torch.ones(5, 4, device=META))
    assert found.shape == (5, 4)
    assert found.device == META


def test_it_comes_back() -> None:
    graph = trace(Positions(), torch.ones(2, 4))
    x = torch.randn(3, 4)
    expected, weights = graph(x), {name: t.clone() for name, t in graph.state_dict().items()}
    graph.to(META).to_empty(device="cpu")
    for name, tensor in graph.state_dict().items():
        tensor.copy_(weights[name])
    graph.offset.fill_(1.0)
    assert devices(graph) == {torch.device("cpu")}
    assert torch.equal(graph(x), expected)


def test_it_is_moved_within_another_module() -> None:
    outer = nn.Sequential(trace(Positions(), torch.ones(2, 4)), nn.ReLU()).to(META)
    assert outer(torch.ones(3, 4, device=META)).device == META


def test_another_dtype_leaves_the_nodes_alone() -> None:
    graph = trace(nn.Linear(4, 3), torch.ones(2, 4))
    code = graph.code
    assert graph.to(torch.float64)(torch.ones(2, 4, dtype=torch.float64)).dtype == torch.float64
    assert graph.code == code


def test_moving_one_graph_leaves_those_it_came_from(
    conv_graph: fx.GraphModule, images: list[Tensor]
) -> None:
    expected = conv_graph(images[0])
    prepared = fxmpq.prepare(conv_graph, "reference")
    for name, parameter in prepared.named_parameters():
        assert parameter.data_ptr() == conv_graph.get_parameter(name).data_ptr()
    prepared.to(torch.float64)
    assert {parameter.dtype for parameter in conv_graph.parameters()} == {torch.float32}
    assert torch.equal(conv_graph(images[0]), expected)


def test_steps_keep_the_class(
    conv_graph: fx.GraphModule,
    images: list[Tensor],
    calibrated: Callable[..., fx.GraphModule],
    uniform: Callable[..., fx.GraphModule],
    tmp_path: object,
) -> None:
    planned = uniform(calibrated(conv_graph, images))
    loaded = fxmpq.load(fxmpq.save(planned, tmp_path))
    converted = fxmpq.convert(planned).module
    for graph in (planned, loaded, converted, copy_graph(planned), copy.deepcopy(planned)):
        assert isinstance(graph, QuantizableGraph)
