from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from fxmpq.graph.findings import Join
from fxmpq.graph.joins import JOINS, FoundJoins, describe_join
from fxmpq.graph.layers import find_layers
from fxmpq.graph.trace import trace
from fxmpq.recipes.models.resnet20 import ResNet20


def joined(rule: str, graph: fx.GraphModule, without: tuple[str, ...] = ()) -> FoundJoins:
    layers = [layer for layer in find_layers(graph).layers if layer.name not in without]
    return JOINS[rule].find(graph, layers)


def pairs(found: FoundJoins) -> set[tuple[str, str]]:
    return {(join.layer, join.other) for join in found.joins}


def reasons(found: FoundJoins) -> dict[str, str]:
    return {entry.place: entry.reason for entry in found.missed}


def test_a_downsample_reads_what_the_block_reads(conv_graph: fx.GraphModule) -> None:
    assert pairs(joined("shared_input", conv_graph)) == {("downsample.0", "conv1")}
    assert joined("shared_weight", conv_graph) == FoundJoins()


def test_the_downsample_is_added_to_the_main_path(conv_graph: fx.GraphModule) -> None:
    found = joined("added", conv_graph)
    assert found == FoundJoins((Join("added", "downsample.0", "conv2"),))


def test_a_layer_that_takes_no_part_is_a_stranger(conv_graph: fx.GraphModule) -> None:
    found = joined("added", conv_graph, without=("downsample.0",))
    assert pairs(found) == set()
    assert reasons(found) == {
        "conv2": "the other operand of its add is computed by conv (downsample.0.conv2d_3), not by "
        "a quantized layer"
    }


def test_a_chain_of_residual_blocks_is_one_tie() -> None:
    graph = trace(ResNet20().eval(), torch.randn(2, 1, 28, 28))
    found = joined("added", graph)
    first = [f"stage1.{block}.conv2" for block in range(3)]
    assert {("conv", "conv")} | pairs(found) >= {(name, "conv") for name in first}
    # A block's downsample begins a new chain: 3 + 3 + 3 pairs.
    assert len(found.joins) == 9
    assert found.missed == ()


def test_a_norm_between_blocks_ends_a_tie(bert_graph: fx.GraphModule) -> None:
    found = joined("added", bert_graph)
    output = "bert.encoder.layer.0.output.dense"
    assert output not in {name for pair in pairs(found) for name in pair}
    assert reasons(found)[output].startswith(
        "the other operand of its add is computed by layer_norm ("
    )
    # Tables are looked up and added: they are layers too.
    tables = "bert.embeddings.{}_embeddings"
    assert pairs(found) == {
        (tables.format("token_type"), tables.format("word")),
        (tables.format("position"), tables.format("word")),
    }


class Meeting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = (nn.Conv2d(4, 4, 1) for _ in range(3))
        self.gate, self.last = nn.Conv2d(4, 4, 1), nn.Conv2d(12, 4, 1)
        self.offset = nn.Parameter(torch.ones(4, 4, 4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        one = torch.relu(self.one(x)).transpose(2, 3).contiguous()
        two = nn.functional.max_pool2d(self.two(x), 1)
        joined = torch.cat([one, two, self.three(x) + x], 1)
        gated = self.gate(x) + torch.softmax(x, 1)
        return self.last(joined) + self.offset, gated * 2 + 1


def test_what_lies_between_a_layer_and_where_it_meets_others() -> None:
    graph = trace(Meeting(), torch.randn(2, 4, 4, 4))
    assert pairs(joined("concatenated", graph)) == {("two", "one"), ("three", "one")}
    found = joined("added", graph)
    assert pairs(found) == set()
    assert reasons(found) == {
        "three": "the other operand of its add is the model's input 'x'",
        "gate": "the other operand of its add is computed by softmax (softmax), not by a quantized "
        "layer",
        "last": "the other operand of its add is the stored 'offset'",
    }


class Dense(nn.Module):
    """Concatenations of concatenations, as DenseNet has them, then a sum."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(2 * (i + 1), 2, 1) for i in range(depth))
        self.stem, self.side = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2 * (depth + 1), 1)

    def forward(self, x: Tensor) -> Tensor:
        found = self.stem(x)
        for layer in self.layers:
            found = torch.cat([found, layer(found)], 1)
        return found + self.side(x)


def test_sums_and_concatenations_see_through_each_other() -> None:
    graph = trace(Dense(5), torch.randn(2, 2, 3, 3))
    layers = {f"layers.{index}" for index in range(5)}
    assert pairs(joined("concatenated", graph)) == {(name, "stem") for name in layers}
    # With the rule for sums alone, all that was concatenated meets the other operand.
    assert pairs(joined("added", graph)) == {(name, "stem") for name in (*layers, "side")}


def test_tied_weights_are_joined_and_indices_are_no_activation(tied_head: nn.Module) -> None:
    graph = trace(tied_head, torch.ones(2, 3, dtype=torch.long))
    assert pairs(joined("shared_weight", graph)) == {("table#2", "table")}
    assert joined("shared_input", graph) == FoundJoins()


def test_joins_say_what_they_are() -> None:
    said = {rule: describe_join(Join(rule, "b", "a")) for rule in (*JOINS, "tied", "shared_range")}
    assert said == {
        "shared_weight": "has the weight of a",
        "shared_input": "reads the input of a",
        "added": "is added to a",
        "concatenated": "is concatenated with a",
        "tied": "is tied to a",
        "shared_range": "has a range in common with a",
    }
    assert describe_join(Join("added", "x.b", "x.a"), "a") == "is added to a"
