from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from fxmpq.formats import Precision
from fxmpq.graph.findings import Join
from fxmpq.graph.prepare import insert_quantizers
from fxmpq.graph.rules import TargetRules
from fxmpq.graph.run import run_batch
from fxmpq.graph.state import state_of
from fxmpq.graph.switch import with_choices
from fxmpq.graph.trace import trace
from fxmpq.sensitivity.measure import measure
from fxmpq.solver.solve import solve
from fxmpq.steps import cost

Planned = Callable[..., fx.GraphModule]


class ReadsTwice(nn.Module):
    """A tensor that one convolution reads, and another one through pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.near, self.far = nn.Conv2d(2, 3, 1), nn.Conv2d(2, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        pooled = functional.max_pool2d(x, 2)
        return self.near(x).mean((2, 3)) + self.far(pooled).mean((2, 3))


@pytest.mark.parametrize(
    ("widths", "groups", "joins"),
    [
        # With one format there is nothing to agree on.
        ((8,), [["near"], ["far"]], ()),
        ((4, 8), [["near", "far"]], (Join("shared_input", "far", "near"),)),
    ],
)
def test_layers_that_read_one_site_share_its_format(
    chip_rules: TargetRules,
    widths: tuple[int, ...],
    groups: list[list[str]],
    joins: tuple[Join, ...],
) -> None:
    graph = trace(ReadsTwice().eval(), torch.randn(2, 2, 4, 4))
    through = frozenset({torch.ops.aten.max_pool2d.default})
    rules = replace(chip_rules, joins=("shared_weight", "shared_input"), through=through)
    candidates = [Precision(4, width) for width in widths]
    prepared = insert_quantizers(graph, rules, candidates=candidates)
    state = state_of(prepared)
    assert [[layer.name for layer in group.layers] for group in state.groups] == groups
    assert state.joins == joins
    (quantizer,) = next(iter(prepared.graph.find_nodes(op="placeholder"))).users
    assert {str(reader.target) for reader in quantizer.users} == {
        "aten.conv2d.default",
        "aten.max_pool2d.default",
    }


def test_layers_of_one_input_differ_in_a_weight_only_plan(
    bert_graph: fx.GraphModule, token_batches: list[dict[str, Tensor]], calibrated: Planned
) -> None:
    candidates = [Precision.parse(name) for name in ("w2b32", "w4b32", "w8b32")]
    graph = calibrated(bert_graph, token_batches, "onnxruntime", candidates=candidates)
    query, key = (f"bert.encoder.layer.0.attention.self.{name}" for name in ("query", "key"))
    # The key's errors are as if they did not matter, so that no bits are spent on it.
    found = measure(graph, token_batches, method="sqnr", progress=False)
    found = replace(found, values={**found.values, key: dict.fromkeys(found.values[key], 0.0)})
    plan = solve(found, cost(graph), "weights=24%")
    assert (plan.choices[key], plan.choices[query]) == ("w2b32", "w4b32")
    run_batch(with_choices(graph, plan.choices), token_batches[0])
