from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from torch import Tensor, fx, nn

import fxmpq
from fxmpq.errors import FxmpqError
from fxmpq.formats import Precision
from fxmpq.graph.prepare import insert_quantizers
from fxmpq.graph.rules import TargetRules
from fxmpq.graph.trace import trace
from fxmpq.report.groups import describe_groups
from fxmpq.targets.registry import get_target


def lines(graph: fx.GraphModule) -> list[str]:
    """What is printed, without the branches' lines."""
    console = Console(width=400)
    with console.capture() as capture:
        console.print(describe_groups(graph), highlight=False)
    kept = [line.strip("│├└─ ") for line in capture.get().splitlines()]
    return [re.sub(r" {2,}", " | ", line) for line in kept]


class Net(nn.Module):
    """Two convolutions on one input, a layer called twice, tied weights, and a product."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(2, 4, 1)
        self.right = nn.Conv2d(2, 4, 1)
        self.twice = nn.Linear(4, 4)
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.left(x)) * self.right(x)
        hidden = self.twice(x.mean((2, 3)))
        hidden = self.twice(hidden * 2)
        return self.out(hidden) @ hidden.t()[:3, :1]


@pytest.fixture(scope="module")
def prepared() -> fx.GraphModule:
    graph = trace(Net().eval(), torch.randn(2, 2, 5, 5))
    return fxmpq.prepare(graph, "onnxruntime", candidates=["w4a8", "w8a8"], exclude=["out"])


def test_the_heading_adds_up(prepared: fx.GraphModule) -> None:
    # weights 2*8 + 16 of 44 in layers; MACs 2*200 + 2*16 of those, 12 and the product's
    heading = lines(prepared)[0]
    assert heading.startswith("4 layers in 2 groups for onnxruntime: 128 B of weights (72.7 %")
    assert "432 MACs a sample" in heading


def test_groups_name_operators_sizes_and_why_they_share(prepared: fx.GraphModule) -> None:
    found = lines(prepared)
    # 16 weights of 4 bits and 8 scales of 4 bytes
    at = found.index("left | 2 layers | w4a8 w8a8 | 64 B to 40 B | 400 MACs")
    assert found[at + 1 : at + 4] == [
        "left | conv-relu 4x2x1x1 | 200 MACs",
        "right | conv 4x2x1x1 | 200 MACs, reads the input of left",
        "not conv-relu: its output is read by mul",
    ]
    assert found[at + 4].startswith("stored as uint8: x")
    at = found.index("twice | 2 layers | w4a8 w8a8 | 64 B to 24 B | 32 MACs")
    assert found[at + 2] == "twice#2 | linear 4x4 | 16 MACs, has the weight of twice"


def test_what_stays_float_is_listed_by_reason(prepared: fx.GraphModule) -> None:
    found = lines(prepared)
    start = next(index for index, line in enumerate(found) if line.startswith("stays in float"))
    text = found[start:]
    assert text[0] == "stays in float | 2 in all"
    at = text.index("kept in float by the user, 12 MACs")
    assert text[at + 1] == "out"
    assert any("computed in float" in line for line in text)


def test_the_chosen_precision_is_marked(
    conv_graph: fx.GraphModule,
    images: list[Tensor],
    calibrated: Callable[..., fx.GraphModule],
    uniform: Callable[..., fx.GraphModule],
) -> None:
    graph = uniform(calibrated(conv_graph, images))
    marked = [str(branch.label) for branch in describe_groups(graph).children]
    assert all(label.count("[reverse]") == 1 for label in marked)
    assert all(line.count(">w") == 1 for line in lines(graph) if "| w" in line or "| >w" in line)
    unmarked = describe_groups(calibrated(conv_graph, images)).children
    assert not any("[reverse]" in str(branch.label) for branch in unmarked)


def test_single_layers_take_one_line(bert_graph: fx.GraphModule) -> None:
    found = lines(fxmpq.prepare(bert_graph, "reference", candidates=["w8a8"]))
    names = [line.split()[0] for line in found]
    assert names.count("classifier") == 1
    assert names.count("key") == names.count("value") == names.count("query") == 2
    line = next(line for line in found if line.startswith("bert.embeddings.word_embeddings"))
    assert line == "bert.embeddings.word_embeddings | embedding 40x16 | w8 | 2.56 kB to 800 B"


def test_a_graph_without_groups_is_told(conv_graph: fx.GraphModule) -> None:
    with pytest.raises(FxmpqError, match=r"call fxmpq.prepare\(graph, target\) first"):
        describe_groups(conv_graph)


def columns(graph: fx.GraphModule, words: str) -> set[int]:
    """Where a column begins, in the lines as they are printed."""
    console = Console(width=400)
    with console.capture() as capture:
        console.print(describe_groups(graph), highlight=False)
    found = (re.search(words, line) for line in capture.get().splitlines())
    return {match.start() for match in found if match}


def test_columns_are_aligned_over_groups_and_their_layers(prepared: fx.GraphModule) -> None:
    assert len(columns(prepared, r"(conv|linear|conv-relu) \d|2 layers")) == 1
    assert len(columns(prepared, r"w4a8 w8a8")) == 1
    assert len(columns(prepared, r"\d+ B to")) == 1


def test_fusions_are_counted_and_those_of_no_layer_named_where_they_are_stored(
    conv_graph: fx.GraphModule,
) -> None:
    found = lines(fxmpq.prepare(conv_graph, "onnxruntime"))
    assert found[1] == "fused: 2 conv-relu, 1 add-relu"
    assert any("relu__1 (add-relu)" in line for line in found if line.startswith("stored as"))
    plain = lines(fxmpq.prepare(conv_graph, "reference"))
    assert not any("fused" in line or "relu" in line.split(":")[0] for line in plain)


def test_ties_residual_joins_and_ranges_are_told(
    conv_graph: fx.GraphModule, chip_rules: TargetRules
) -> None:
    found = lines(insert_quantizers(conv_graph, chip_rules, ties=[("fc", "stem.0")]))
    assert any(line.endswith("MACs, is tied to stem.0") for line in found)
    assert any(line.endswith("MACs, reads the input of conv1, is added to conv2") for line in found)
    at = found.index("tensors of one range")
    assert found[at + 1] == "conv2.conv2d_2, downsample.0.conv2d_3"
    told = lines(insert_quantizers(conv_graph, chip_rules, exclude=["conv2"]))
    at = told.index("tensors of one range")
    assert told[at + 1] == "not one range at add (add_): conv2.conv2d_2 stays in float"
    assert any(line.startswith("not added: the other operand of its add is") for line in told)


def test_reasons_that_are_the_same_take_one_line(
    conv_graph: fx.GraphModule, chip_rules: TargetRules
) -> None:
    rules = replace(chip_rules, fusions=(("conv", "gelu"), ("conv", "silu"), ("conv", "add")))
    found = lines(insert_quantizers(conv_graph, rules))
    reason = "its output is read by stem.2.relu_"
    assert f"not conv-gelu or conv-silu or conv-add: {reason}" in found


def test_products_have_no_weights_and_are_counted() -> None:
    class Similarity(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.key = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.query(x) @ self.key(x).transpose(1, 2)

    graph = trace(Similarity().eval(), torch.randn(2, 3, 4))
    prepared = insert_quantizers(
        graph, get_target("reference").rules, candidates=[Precision(8, 8)], products=True
    )
    found = lines(prepared)
    assert found[0].startswith("2 layers and 1 product in 2 groups")
    # 3 x 3 results of 4 terms each
    assert "matmul | matmul | a8 | 36 MACs" in found
