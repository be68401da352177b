"""Products that read bfloat16."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from fxmpq.graph.run import run_batch
from fxmpq.graph.state import copy_graph
from fxmpq.graph.trace import trace
from fxmpq.targets.bfloat16 import PRODUCTS, in_bfloat16, in_bfloat16_for, narrow_products
from fxmpq.targets.lowering import finish

aten = torch.ops.aten
BATCH = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


class Squares(nn.Module):
    """A layer, two products of what it gives, and one by what is stored."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.fc(x)
        return (rows @ rows.T).relu() @ (rows @ self.fc.weight)


def narrowed(*targets: object) -> tuple[fx.GraphModule, fx.GraphModule, dict[str, str]]:
    graph = trace(Squares(), BATCH)
    changed = copy_graph(graph)
    places = narrow_products(changed, lambda node: node.target in targets, in_bfloat16_for)
    finish(changed)
    return graph, changed, places


def test_each_product_reads_bfloat16_and_returns_floats() -> None:
    graph, changed, places = narrowed(*PRODUCTS)
    assert places == {
        "linear": "fc.linear",
        "matmul": "matmul",
        "matmul_1": "matmul_1",
        "matmul_2": "matmul_2",
    }
    read: dict[str, set[torch.dtype]] = {}

    class Look(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            operands = self.fetch_args_kwargs_from_env(n)[0]
            read[n.name] = {value.dtype for value in operands if isinstance(value, Tensor)}
            return super().run_node(n)

    Look(changed).run(BATCH, enable_io_processing=False)
    assert all(read[name] == {torch.bfloat16} for name in places)
    assert read["relu"] == {torch.float32}
    (found,), (expected,) = run_batch(changed, BATCH), run_batch(graph, BATCH)
    assert isinstance(found, Tensor)
    assert found.dtype is torch.float32
    assert not torch.equal(found, expected)
    torch.testing.assert_close(found, expected, atol=0.05, rtol=0.05)


def test_a_stored_operand_is_rounded_once_and_shared() -> None:
    graph, changed, _ = narrowed(*PRODUCTS)
    stored = changed.state_dict()
    assert sorted(stored) == ["bfloat16_fc_bias", "bfloat16_fc_weight"]
    weight = graph.state_dict()["fc.weight"]
    assert weight.dtype is torch.float32
    assert torch.equal(stored["bfloat16_fc_weight"], weight.bfloat16())


def test_what_is_not_asked_for_stays_as_it_is() -> None:
    graph, changed, places = narrowed(aten.linear.default)
    assert places == {"linear": "fc.linear"}
    # The other reader of the weight reads it as it was.
    assert sorted(changed.state_dict()) == ["bfloat16_fc_bias", "bfloat16_fc_weight", "fc.weight"]
    graph, changed, places = narrowed()
    assert places == {}
    assert [node.name for node in changed.graph.nodes] == [node.name for node in graph.graph.nodes]


def test_stored_integers_stay_integers() -> None:
    graph = fx.Graph()
    x, counts = graph.placeholder("x"), graph.get_attr("counts")
    product = graph.call_function(aten.matmul.default, (x, counts))
    graph.output(product)
    module = nn.Module()
    module.register_buffer("counts", torch.arange(4))
    assert in_bfloat16_for(fx.GraphModule(module, graph), product, counts) is counts


@given(st.floats(width=32, allow_nan=False))
@example(torch.finfo(torch.float32).min)
@example(torch.finfo(torch.float32).max)
def test_a_finite_number_stays_finite_and_what_bfloat16_reaches_is_rounded(value: float) -> None:
    x = torch.tensor(value)
    found = in_bfloat16(x)
    assert found.isinf() == x.isinf()
    limit = torch.finfo(torch.bfloat16).max
    if x.isinf() or abs(value) <= limit:
        assert torch.equal(found, x.bfloat16())
    else:
        assert float(found) == pytest.approx(limit if value > 0 else -limit)
