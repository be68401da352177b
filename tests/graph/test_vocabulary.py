from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

from fxmpq.graph.trace import trace
from fxmpq.graph.vocabulary import (
    ACTIVATIONS,
    MEETINGS,
    MOVEMENTS,
    POOLINGS,
    is_operator_name,
    met_tensors,
    operator_name,
)


class Meets(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.bias = nn.Parameter(torch.ones(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.conv(x)) + self.bias + 1
        return torch.cat([y, x, y.argmax(1, keepdim=True).float()], 1)


def test_operators_are_called_by_kind_or_by_their_name_in_aten() -> None:
    graph = trace(Meets(), torch.randn(2, 3, 4, 4))
    names = [name for name in map(operator_name, graph.graph.nodes) if name is not None]
    assert names == ["conv", "relu", "add", "add", "argmax", "to", "cat"]


def test_what_is_no_operator_has_no_name(conv_graph: fx.GraphModule) -> None:
    for node in conv_graph.graph.nodes:
        assert (operator_name(node) is None) is (node.op != "call_function")


def test_numbers_do_not_meet() -> None:
    graph = trace(Meets(), torch.randn(2, 3, 4, 4))
    found = {
        node.name: [tensor.name for tensor in met_tensors(node)]
        for node in graph.graph.nodes
        if operator_name(node) in MEETINGS
    }
    assert found == {"add": ["relu", "bias"], "add_1": ["add"], "cat": ["add_1", "x", "to"]}


def test_every_name_of_the_vocabulary_is_an_operators() -> None:
    for names in (MEETINGS, MOVEMENTS, POOLINGS, ACTIVATIONS):
        assert [name for name in names if not is_operator_name(name)] == []


@pytest.mark.parametrize("name", ["rleu", "", "relu-add", "conv_relu", "__class__x"])
def test_other_names_are_none(name: str) -> None:
    assert not is_operator_name(name)


def test_sets_of_names_do_not_overlap() -> None:
    every = [*MEETINGS, *MOVEMENTS, *POOLINGS, *ACTIVATIONS]
    assert len(every) == len(set(every))
