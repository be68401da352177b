from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from rich.console import Console
from torch import Tensor, fx, nn

import fxmpq
from fxmpq.errors import FxmpqError
from fxmpq.graph.trace import trace
from fxmpq.report.groups import describe_groups


def lines(graph: fx.GraphModule) -> list[str]:
    """What is printed, without the branches' lines."""
    console = Console(width=400)
    with console.capture() as capture:
        console.print(describe_groups(graph), highlight=False)
    return [line.strip("│├└─ ") for line in capture.get().splitlines()]


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
    at = found.index("left  w4a8 w8a8  64 B to 40 B, 400 MACs")
    assert found[at + 1 : at + 3] == [
        "left  conv + relu 4x2x1x1, 200 MACs",
        "right  conv 4x2x1x1, 200 MACs  reads the input of left",
    ]
    assert found[at + 3].startswith("stored as uint8: x")
    at = found.index("twice  w4a8 w8a8  64 B to 24 B, 32 MACs")
    assert found[at + 2] == "twice#2  linear 4x4, 16 MACs  has the weight of twice"


def test_what_stays_float_is_listed_by_reason(prepared: fx.GraphModule) -> None:
    found = lines(prepared)
    start = next(index for index, line in enumerate(found) if line.startswith("stays in float"))
    text = found[start:]
    assert text[0] == "stays in float  2 in all"
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
    assert all(line.count(">w") == 1 for line in lines(graph) if "  w" in line)
    unmarked = describe_groups(calibrated(conv_graph, images)).children
    assert not any("[reverse]" in str(branch.label) for branch in unmarked)


def test_single_layers_take_one_line(bert_graph: fx.GraphModule) -> None:
    found = lines(fxmpq.prepare(bert_graph, "reference", candidates=["w8a8"]))
    names = [line.split()[0] for line in found]
    assert names.count("classifier") == 1
    assert names.count("key") == names.count("value") == names.count("query") == 2
    line = next(line for line in found if line.startswith("bert.embeddings.word_embeddings"))
    assert line == "bert.embeddings.word_embeddings  embedding 40x16  w8  2.56 kB to 800 B"


def test_a_graph_without_groups_is_told(conv_graph: fx.GraphModule) -> None:
    with pytest.raises(FxmpqError, match=r"call fxmpq.prepare\(graph, target\) first"):
        describe_groups(conv_graph)
