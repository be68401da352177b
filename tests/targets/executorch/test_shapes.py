from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

from fxmpq.formats import Precision
from fxmpq.graph.run import run_batch
from fxmpq.graph.switch import with_choices
from fxmpq.graph.trace import trace
from fxmpq.targets.convert import convert
from fxmpq.targets.divergence import layer_agreements
from fxmpq.targets.executorch.shapes import pad_by_slices
from fxmpq.targets.target import agreement_db

Made = Callable[..., fx.GraphModule]
aten = torch.ops.aten


class Behind(nn.Module):
    """Linear layers on what XNNPACK keeps with the channels last: one padded in a circle."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular")
        self.one, self.other = nn.Linear(4, 6), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = nn.functional.max_pool2d(self.conv(x), 2)
        return self.one(x).relu(), self.other(x.transpose(2, 3))


def test_rows_run_behind_convolutions_and_pooling(calibrated: Made) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 8, 8)
    candidates = [Precision.parse(name) for name in ("w8a8", "w8a8dt")]
    graph = calibrated(trace(Behind().eval(), x), [x], "executorch", candidates=candidates)
    plan = with_choices(graph, {"conv": "w8a8", "one": "w8a8dt", "other": "w8a8dt"})
    made = convert(plan, verify=[x])
    assert [row.kernel for row in made.layers[1:]] == [
        "Fully Connected (NC, QDU8, F32, QC8W) GEMM"
    ] * 2
    assert all(entry.sqnr_db > 40 for entry in layer_agreements(plan, made, x))
    more = torch.randn(11, 3, 8, 8)
    assert agreement_db(list(run_batch(plan, more)), made.run(more)) > 35


@pytest.mark.parametrize(
    "widths", [(1, 1), (0, 2, 3, 0), (0, 0, 2, 1), (2, 3, 1, 1, 2, 0), (1, -1)]
)
def test_circular_padding_is_the_same_values(widths: tuple[int, ...]) -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(aten.pad.default, (x, list(widths), "circular")))
    module = fx.GraphModule(nn.Module(), graph)
    values = torch.arange(2 * 3 * 4 * 5 * 6).reshape(2, 3, 4, 5, 6)[:, :, : len(widths) // 2 + 1]
    values = values if len(widths) > 4 else values[:, 0] if len(widths) > 2 else values[:, 0, 0]
    expected = module(values)
    pad_by_slices(module)
    module.recompile()
    assert torch.equal(module(values), expected)
    left = graph.find_nodes(op="call_function", target=aten.pad.default)
    assert len(left) == (min(widths) < 0)


def test_other_padding_is_left() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(aten.pad.default, (x, [1, 1], "reflect")))
    module = fx.GraphModule(nn.Module(), graph)
    pad_by_slices(module)
    assert [node.op for node in graph.nodes] == ["placeholder", "call_function", "output"]
