from __future__ import annotations

import inspect

import pytest
import torch
from torch import fx, nn
from torch.nn import functional

from fxmpq.graph.operators import KINDS, OPERATORS, argument, operator_of, output_channels
from fxmpq.graph.trace import trace

aten = torch.ops.aten


@pytest.mark.parametrize("target", OPERATORS)
def test_positions_are_those_of_the_schema(target: torch._ops.OpOverload) -> None:
    operator = OPERATORS[target]
    names = [entry.name for entry in target._schema.arguments]
    assert names[operator.weight] == "weight"
    assert names[operator.input] in ("input", "indices", "x")
    if operator.bias is None:
        assert "bias" not in names
    else:
        assert names[operator.bias] == "bias"


def test_every_kind_is_named_once() -> None:
    assert KINDS == ("conv", "conv_transpose", "linear", "experts", "embedding")


@pytest.mark.parametrize(
    ("call", "output", "weight", "expected"),
    [
        (aten.conv2d.default, (1, 64, 112, 112), (64, 3, 7, 7), 64 * 112 * 112 * 3 * 49),
        (aten.conv1d.default, (1, 6, 10), (6, 1, 5), 6 * 10 * 5),
        (aten.conv3d.default, (1, 2, 3, 4, 5), (2, 8, 1, 1, 1), 2 * 60 * 8),
        (aten.linear.default, (1, 7, 30), (30, 20), 7 * 30 * 20),
        (torch.ops.fxmpq.linear.default, (1, 7, 30), (30, 20), 7 * 30 * 20),
        (torch.ops.fxmpq.grouped_linear.default, (9, 8), (4 * 8, 5), 9 * 8 * 5),
        (torch.ops.fxmpq.batched_linear.default, (4, 9, 8), (4 * 8, 5), 4 * 9 * 8 * 5),
        (aten.embedding.default, (1, 7, 30), (1000, 30), 0),
    ],
)
def test_multiply_accumulates(
    call: object, output: tuple[int, ...], weight: tuple[int, ...], expected: int
) -> None:
    found = OPERATORS[call].macs(torch.Size([1]), torch.Size(output), torch.Size(weight))
    assert found == expected


@pytest.mark.parametrize("groups", [1, 3])
def test_transposed_convolutions_count_from_their_inputs(groups: int) -> None:
    layer = nn.ConvTranspose2d(6, 9, (2, 3), stride=2, groups=groups)
    graph = trace(layer, torch.ones(2, 6, 5, 4))
    [node] = [node for node in graph.graph.nodes if operator_of(node) is not None]
    operator = OPERATORS[node.target]
    assert operator.kind == "conv_transpose"
    shapes = (torch.Size([1, 6, 5, 4]), torch.Size([1, 9, 10, 9]), layer.weight.shape)
    assert operator.macs(*shapes) == 6 * 5 * 4 * (9 // groups) * 2 * 3
    assert layer.weight.shape[operator.channel_axis] == 9 // groups
    assert output_channels(node, layer.weight.shape) == 9


def test_other_layers_have_a_channel_a_row() -> None:
    graph = trace(nn.Sequential(nn.Conv2d(4, 6, 1, groups=2), nn.Flatten()), torch.ones(2, 4, 3, 3))
    [node] = [node for node in graph.graph.nodes if operator_of(node) is not None]
    assert output_channels(node, torch.Size([6, 2, 1, 1])) == 6


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("padding", [1, "same"])
def test_exported_layers_are_in_the_table(rank: int, padding: object) -> None:
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1](2, 4, 3, padding=padding)
    graph = trace(conv, torch.ones(2, 2, *[5] * rank))
    found = [operator_of(node) for node in graph.graph.nodes]
    assert [entry.kind for entry in found if entry is not None] == ["conv"]


def test_arguments_that_are_left_out_are_none() -> None:
    graph = fx.Graph()
    x, weight = graph.placeholder("x"), graph.placeholder("weight")
    node = graph.call_function(aten.linear.default, (x, weight))
    assert argument(node, 1) is weight
    assert argument(node, 2) is None
    assert argument(node, None) is None
    assert operator_of(x) is None


def test_the_table_holds_no_function_of_the_functional_module() -> None:
    # Graphs are of ATen operators; a Python function in the table would never be found.
    functions = {value for _, value in inspect.getmembers(functional, callable)}
    assert not functions & set(OPERATORS)
