from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from fxmpq.graph.state import copy_graph
from fxmpq.quantizers.modules import ActivationQuantizer, WeightQuantizer
from fxmpq.refinement.walk import Walk

from .conftest import draw, run_adaquant


class Fork(nn.Module):
    """Two layers read one tensor; a third reads another alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.left, self.right = (nn.Linear(8, 8) for _ in range(3))
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        return self.last((self.left(x) + self.right(x)).relu())


def test_only_ranges_with_one_reader_are_trained(plan_of: Callable[..., Any]) -> None:
    torch.manual_seed(4)
    batches = [draw(16, 8, seed=seed) for seed in range(3)]
    subject = plan_of(Fork(), batches, precisions=("w4a4",))
    graph = subject.planned
    before = {name: m.ranges["uint4"] for name, m in ranges(graph)}
    run_adaquant(graph, batches, steps=40, range_rate=0.02)
    readers = {str(n.target): len(n.users) for n in graph.graph.nodes if n.op == "call_module"}
    changed = {name for name, m in ranges(graph) if m.ranges["uint4"] != before[name]}
    assert changed == {name for name, _ in ranges(graph) if readers[name] == 1}
    assert len(changed) == 2


def ranges(graph: fx.GraphModule) -> list[tuple[str, ActivationQuantizer]]:
    return [(n, m) for n, m in graph.named_modules() if isinstance(m, ActivationQuantizer)]


@pytest.mark.parametrize("rectified", [True, False])
@pytest.mark.parametrize("sequential", [True, False])
def test_the_error_is_what_the_variant_says(
    plan_of: Callable[..., Any], rectified: bool, sequential: bool
) -> None:
    torch.manual_seed(5)
    batches = [draw(12, 8, seed=seed) for seed in range(2)]
    graph = plan_of(Fork(), batches, precisions=("w3a4",)).planned
    done = {
        entry.layer: entry
        for entry in run_adaquant(
            graph, batches, steps=5, rectified=rectified, sequential=sequential
        )
    }
    for view in Walk(graph, batches).layers():
        noise = signal = 0.0
        for batch in range(len(batches)):
            x = view.input(batch)
            if not sequential:
                x = view.input_quantizer(view.float_input(batch))
            found = view.output(x, view.quantized_weight, view.quantized_bias)
            expected = view.float_output(batch)
            if rectified and view.layer.name == "first":
                found, expected = found.relu(), expected.relu()
            noise += float((found - expected).square().sum())
            signal += float(expected.square().sum())
        assert done[view.layer.name].after == pytest.approx(noise / signal, rel=1e-4)


def test_behind_a_relu_only_what_passes_it_counts(plan_of: Callable[..., Any]) -> None:
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
    with torch.no_grad():
        model[0].bias[:3] = -50.0
    batches = [draw(32, 8, seed=seed) for seed in range(2)]
    graph = plan_of(model, batches, precisions=("w2a8",)).planned
    view = next(iter(Walk(graph, batches).layers()))
    first = run_adaquant(copy_graph(graph), batches, steps=1)[0].before
    whole = run_adaquant(copy_graph(graph), batches, steps=1, rectified=False)[0].before
    assert whole == pytest.approx(view.error())
    # The dead channels hold nearly all of the layer's power, and none behind the ReLU.
    assert first > 10 * whole


def test_parallel_layers_do_not_depend_on_each_other(plan_of: Callable[..., Any]) -> None:
    torch.manual_seed(6)
    batches = [draw(12, 8, seed=seed) for seed in range(2)]
    planned = plan_of(Fork(), batches, precisions=("w3a8",)).planned
    alone, after_others = copy_graph(planned), copy_graph(planned)
    for graph, rate in ((alone, 0.0), (after_others, 0.1)):
        for name, m in graph.named_modules():
            if isinstance(m, WeightQuantizer) and "first" in name and rate:
                m.set_codes(m.active, torch.zeros(8, 8))
        run_adaquant(graph, batches, steps=6, sequential=False)
    for name, m in alone.named_modules():
        if isinstance(m, WeightQuantizer) and "last" in name:
            other = after_others.get_submodule(name)
            assert torch.equal(m.stored_codes(m.active), other.stored_codes(m.active))
            assert torch.equal(m.scale(m.active), other.scale(m.active))


def test_a_layer_without_a_bias_gets_one(plan_of: Callable[..., Any]) -> None:
    batches = [draw(32, 6, seed=seed) + 2 for seed in range(2)]
    torch.manual_seed(7)
    graph = plan_of(nn.Linear(6, 4, bias=False), batches, precisions=("w2a8",)).planned
    only = {"weight_rate": 0.0, "scale_rate": 0.0, "range_rate": 0.0, "bias_rate": 0.05}
    view = next(iter(Walk(graph, batches).layers()))
    view.set_bias(torch.zeros(4))
    [found] = run_adaquant(graph, batches, steps=100, **only)
    difference = torch.cat(
        [
            view.output(view.input(i), view.quantized_weight, None) - view.float_output(i)
            for i in range(2)
        ]
    )
    assert torch.allclose(view.quantized_bias, -difference.mean(0), atol=0.05)
    assert found.after < found.before
