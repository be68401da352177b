from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from fxmpq.errors import FxmpqError
from fxmpq.graph.state import copy_graph, require
from fxmpq.graph.trace import trace
from fxmpq.refinement.blocks import Block, find_blocks
from fxmpq.refinement.walk import Walk
from fxmpq.steps import prepare

Subject = Any


def layers_of(graph: fx.GraphModule) -> list[list[str]]:
    """Names of the layers in each block."""
    names = {
        layer.node: layer.name
        for group in require(graph, stage="prepared").groups
        for layer in group.layers
    }
    blocks = [[names[n.name] for n in b.nodes if n.name in names] for b in find_blocks(graph)]
    return [block for block in blocks if block]


def prepared(model: nn.Module, *inputs: Tensor, target: str = "reference") -> fx.GraphModule:
    return prepare(trace(model.eval(), inputs), target)


def test_every_node_is_in_one_block_in_graph_order(subject: Subject) -> None:
    blocks = find_blocks(subject.planned)
    nodes = [node for block in blocks for node in block.nodes]
    assert nodes == [node for node in subject.planned.graph.nodes if node.op != "output"]
    for block in blocks:
        assert block.output in block.nodes
        assert block.output.meta["val"].is_floating_point()


def test_blocks_read_no_layers_work_but_the_output_of_one_before(subject: Subject) -> None:
    """Across a cut goes one value that layers have computed; two outputs may fork from one."""
    deep: set[fx.Node] = set()
    layers = {
        layer.node
        for group in require(subject.planned, stage="prepared").groups
        for layer in group.layers
    }
    outputs: list[fx.Node] = []
    for block in find_blocks(subject.planned):
        entering = {
            entry for node in block.nodes for entry in node.all_input_nodes if entry in deep
        } - set(block.nodes)
        # A quantizer behind the cut may be read where it stands for its source.
        entering = {entry.args[0] if entry.op == "call_module" else entry for entry in entering}
        assert len(entering - set(block.nodes)) <= 1
        for node in block.nodes:
            if node.name in layers or any(entry in deep for entry in node.all_input_nodes):
                deep.add(node)
        outputs.append(block.output)
    assert len(set(outputs)) == len(outputs)


def test_running_all_blocks_is_running_the_graph(
    subject: Subject, values_of: Callable[..., dict[str, object]]
) -> None:
    floats = [values_of(subject.calibrated, batch) for batch in subject.batches]
    planned = [values_of(subject.planned, batch) for batch in subject.batches]
    names = []
    for view in Walk(copy_graph(subject.planned), subject.batches).blocks():
        names += [layer.layer.name for layer in view.layers]
        for batch in range(len(view)):
            output = view.block.output.name
            assert torch.equal(view.float_output(batch), floats[batch][output])
            assert torch.equal(view.output(batch), planned[batch][output])
    views = list(Walk(subject.planned, subject.batches).layers())
    assert names == [view.layer.name for view in views]


def test_a_residual_block_comes_out_whole(subject_of: Callable[[str], Subject]) -> None:
    expected = [["stem.0"], ["conv1", "downsample.0", "conv2"], ["fc"]]
    for name in ("conv", "conv_onnxruntime"):
        graph = subject_of(name).planned
        assert [sorted(found) for found in layers_of(graph)] == [sorted(e) for e in expected]
        # The ReLU behind the sum belongs to the block, the mean to the classifier.
        assert "relu" in find_blocks(graph)[1].output.name


def test_transformers_resnet_blocks(subject_of: Callable[[str], Subject]) -> None:
    found = layers_of(subject_of("resnet").planned)
    assert [len(block) for block in found] == [1, 2, 3, 2, 1]
    assert all("shortcut" in found[2][i] for i in range(3) if "shortcut" in found[2][i])


def test_bert_has_an_attention_and_a_feed_forward_block_a_layer(
    subject_of: Callable[[str], Subject],
) -> None:
    for name in ("bert", "bert_onnxruntime"):
        *embeddings, one, two, three, four, pooler, head = layers_of(subject_of(name).planned)
        # Each embedding adds to the one before, and reads nothing else that a layer computed.
        kinds = ("word", "token_type", "position")
        assert embeddings == [[f"bert.embeddings.{kind}_embeddings"] for kind in kinds]
        parts = [[entry.rsplit(".", 1)[-1] for entry in found] for found in (one, two, three, four)]
        assert parts == [["query", "key", "value", "dense"], ["dense", "dense"]] * 2
        assert (pooler, head) == (["bert.pooler.dense"], ["classifier"])


def test_vit_blocks_are_those_of_bert(subject_of: Callable[[str], Subject]) -> None:
    patches, *blocks, classifier = layers_of(subject_of("vit").planned)
    assert len(patches) == 1
    assert [len(block) for block in blocks] == [4, 2] * 2
    assert classifier == ["classifier"]


def test_a_chain_has_a_block_a_layer_with_what_follows_it() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=4), nn.Hardswish(),
        nn.Conv2d(4, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 3),
    )  # fmt: skip
    graph = prepared(model, torch.zeros(2, 3, 8, 8))
    assert layers_of(graph) == [["0"], ["2"], ["4"], ["7"]]
    outputs = [str(block.output.target) for block in find_blocks(graph)]
    assert [name.split(".")[1] for name in outputs] == ["relu", "hardswish", "conv2d", "linear"]


class InvertedResidual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.expand, self.project = nn.Conv2d(4, 8, 1), nn.Conv2d(8, 4, 1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.squeeze, self.excite = nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1)
        self.last = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = torch.relu(self.depthwise(torch.relu(self.expand(x))))
        gate = torch.sigmoid(self.excite(torch.relu(self.squeeze(y.mean((2, 3), keepdim=True)))))
        return self.last(x + self.project(y * gate))


def test_a_depthwise_block_with_its_gate_comes_out_whole() -> None:
    found = layers_of(prepared(InvertedResidual(), torch.zeros(2, 3, 8, 8)))
    inner = ["expand", "depthwise", "squeeze", "excite", "project"]
    assert found == [["stem"], inner, ["last"]]


class Dense(nn.Module):
    """DenseNet: every layer reads all that came before."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 4, 1), nn.Linear(8, 2)
        self.parts = nn.ModuleList(nn.Conv2d(4 + 2 * i, 2, 3, padding=1) for i in range(3))
        self.transition = nn.Conv2d(10, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for part in self.parts:
            features.append(torch.relu(part(torch.cat(features, 1))))
        return self.head(torch.relu(self.transition(torch.cat(features, 1))).mean((2, 3)))


def test_a_dense_block_is_one_block() -> None:
    found = layers_of(prepared(Dense(), torch.zeros(2, 3, 4, 4)))
    assert found == [["stem"], ["parts.0", "parts.1", "parts.2"], ["transition"], ["head"]]


class Heads(nn.Module):
    """Hidden states among the outputs, a head halfway, one of integers, one at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.early, self.late = nn.Linear(4, 3), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        first = torch.relu(self.one(x))
        early = self.early(first)
        second = first + torch.relu(self.two(first))
        third = torch.relu(self.three(second))
        last = self.late(third)
        return first, early, second, torch.relu(third), last, last.argmax(-1)


def test_several_outputs_hold_nothing_together() -> None:
    graph = prepared(Heads(), torch.zeros(2, 4))
    assert layers_of(graph) == [["one"], ["early"], ["two"], ["three"], ["late"]]
    outputs = [block.output.meta["val"].shape[-1] for block in find_blocks(graph)]
    assert outputs == [4, 3, 4, 4, 4]


class Interleaved(nn.Module):
    """Two heads whose layers take turns."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 4)
        self.a, self.b, self.c, self.d = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.relu(self.body(x))
        a, b = torch.relu(self.a(x)), torch.relu(self.b(x))
        return self.c(a), self.d(b)


def test_a_view_names_the_layers_that_its_output_depends_on(
    plan_of: Callable[..., Subject],
) -> None:
    torch.manual_seed(0)
    subject = plan_of(Interleaved(), [torch.randn(3, 4)], ("w4a8",))
    views = list(Walk(subject.planned, subject.batches).blocks())
    assert [[layer.layer.name for layer in view.layers] for view in views] == [["body"], ["b", "d"]]
    assert layers_of(subject.planned) == [["body"], ["a", "b", "c", "d"]]


def test_a_second_tower_is_in_the_block_where_it_joins_the_first() -> None:
    class Towers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right, self.both = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.both(torch.relu(self.left(x)) * self.right(y))

    zeros = torch.zeros(2, 4)
    assert layers_of(prepared(Towers(), zeros, zeros)) == [["left"], ["right"], ["both"]]


def test_a_value_of_several_tensors_or_of_integers_is_no_cut() -> None:
    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.table, self.two = nn.Linear(4, 6), nn.Embedding(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            left, right = torch.relu(self.one(x)).chunk(2, dim=-1)
            return self.two(self.table((left * right).argmax(-1)))

    graph = prepared(Routed(), torch.zeros(2, 4))
    assert layers_of(graph) == [["one"], ["table"], ["two"]]
    for block in find_blocks(graph):
        assert block.output.meta["val"].is_floating_point()


def test_a_graph_without_layers_is_one_block() -> None:
    graph = prepared(nn.Sequential(nn.ReLU(), nn.Softmax(-1)), torch.zeros(2, 4))
    [found] = find_blocks(graph)
    assert isinstance(found, Block)
    assert [node.op for node in found.nodes] == ["placeholder", "call_function", "call_function"]


def test_a_traced_graph_is_refused(conv_graph: fx.GraphModule) -> None:
    with pytest.raises(FxmpqError, match="call fxmpq.prepare"):
        find_blocks(conv_graph)
