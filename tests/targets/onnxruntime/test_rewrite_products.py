from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, fx, nn

from fxmpq.formats import Precision
from fxmpq.graph.run import run_batch
from fxmpq.graph.state import Product, state_of, with_state
from fxmpq.graph.switch import with_choices
from fxmpq.graph.trace import trace
from fxmpq.targets.onnxruntime import ONNXRUNTIME
from fxmpq.targets.onnxruntime.convert import convert_onnxruntime
from fxmpq.targets.onnxruntime.rewrite import to_integer_operators
from fxmpq.targets.onnxruntime.rewrite_products import (
    is_stored,
    name_products,
    product_node,
    products_of,
)
from fxmpq.targets.target import agreement_db

Made = Callable[..., fx.GraphModule]

CANDIDATES = (Precision(8, 8), Precision())
PRODUCT = torch.ops.fxmpq.integer_product.default


class Products(nn.Module):
    """A layer and products of every kind, stacked and plain, with and without an addend."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.fc(x)
        one = torch.matmul(hidden, torch.tanh(hidden).transpose(1, 2))
        two = torch.baddbmm(hidden, torch.sigmoid(one), torch.relu(hidden), beta=0.5, alpha=2)
        three = torch.bmm(torch.softmax(one, -1), torch.tanh(two))
        rows, columns = torch.tanh(three).flatten(0, 1), torch.tanh(two).flatten(0, 1)
        four = torch.mm(rows.t(), columns)
        return torch.addmm(rows, torch.sigmoid(three).flatten(0, 1), torch.tanh(four))


@pytest.fixture(scope="module")
def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, 5, 6, generator=generator) for _ in range(2)]


@pytest.fixture(scope="module")
def graph(calibrated: Made, batches: list[Tensor]) -> fx.GraphModule:
    torch.manual_seed(0)
    traced = trace(Products().eval(), batches[0])
    return calibrated(traced, batches, "onnxruntime", candidates=CANDIDATES, products=True)


def planned(graph: fx.GraphModule, in_float: tuple[str, ...] = ()) -> fx.GraphModule:
    groups = state_of(graph).groups
    choices = {group.name: str(group.candidates[group.name in in_float]) for group in groups}
    return with_choices(graph, choices)


def test_every_kind_of_product_runs_on_an_integer_kernel(
    graph: fx.GraphModule, batches: list[Tensor]
) -> None:
    plan = planned(graph)
    made = convert_onnxruntime(plan, None, ONNXRUNTIME.rules)
    rows = {row.layer: (row.asked, row.kernel, row.reason) for row in made.layers}
    names = ["matmul", "baddbmm", "bmm", "mm", "addmm"]
    assert rows == {
        "fc": ("w8a8", "MatMulIntegerToFloat", ""),
        **dict.fromkeys(names, ("a8", "MatMulIntegerToFloat", "")),
    }
    expected = [leaf for leaf in run_batch(plan, batches[0]) if isinstance(leaf, Tensor)]
    assert agreement_db(expected, made.run(batches[0])) >= 35


def test_the_rewritten_graph_computes_the_simulation(
    graph: fx.GraphModule, batches: list[Tensor]
) -> None:
    plan = planned(graph)
    rewritten = to_integer_operators(plan, ONNXRUNTIME.rules)
    assert len(rewritten.graph.find_nodes(op="call_function", target=PRODUCT)) == 5
    found, expected = run_batch(rewritten, batches[1]), run_batch(plan, batches[1])
    assert agreement_db(expected, found) >= 35  # type: ignore[arg-type]


def test_products_in_float_stay_products_of_floats(
    graph: fx.GraphModule, batches: list[Tensor]
) -> None:
    plan = planned(graph, ("matmul", "mm"))
    assert [product.name for product in products_of(plan).values()] == ["baddbmm", "bmm", "addmm"]
    made = convert_onnxruntime(plan, None, ONNXRUNTIME.rules)
    rows = {row.layer: row for row in made.layers}
    assert (rows["mm"].asked, rows["mm"].kernel) == ("fp32", "float")
    assert rows["mm"].reason == "the plan keeps it in float"
    assert rows["bmm"].kernel == "MatMulIntegerToFloat"
    expected = [leaf for leaf in run_batch(plan, batches[0]) if isinstance(leaf, Tensor)]
    assert agreement_db(expected, made.run(batches[0])) >= 35


def test_attention_runs_on_integer_kernels_at_other_sizes(
    calibrated: Made,
    uniform: Made,
    bert_graph: fx.GraphModule,
    token_batches: list[dict[str, Tensor]],
) -> None:
    plan = uniform(calibrated(bert_graph, token_batches, "onnxruntime", products=True))
    made = convert_onnxruntime(plan, None, ONNXRUNTIME.rules)
    kernels = [row.kernel for row in made.layers if row.asked == "a8"]
    assert kernels == ["MatMulIntegerToFloat"] * 4
    for batch in token_batches:  # of different lengths
        shorter = {name: values[:3] for name, values in batch.items()}
        expected = [leaf for leaf in run_batch(plan, shorter) if isinstance(leaf, Tensor)]
        assert agreement_db(expected, made.run(shorter)) >= 35


def test_products_are_told_in_graph_order(graph: fx.GraphModule) -> None:
    plan = planned(graph)
    state = state_of(plan)
    with_state(plan, replace(state, groups=state.groups[::-1]))
    names = [product.name for product in products_of(plan).values()]
    assert names == ["matmul", "baddbmm", "bmm", "mm", "addmm"]


def integers(name: str, second: ir.Value, first: ir.Value) -> ir.Node:
    return ir.node("MatMulIntegerToFloat", [first, second], domain="com.microsoft", name=name)


def test_names_go_to_products_of_computed_tensors_only() -> None:
    x = ir.Value(name="x")
    stored = ir.Value(name="w", const_value=ir.tensor(np.ones((2, 2), np.int8), name="w"))
    nodes = [integers("layer", stored, x), integers("one", x, x), integers("two", x, x)]
    made = ir.Graph([x], [nodes[2].outputs[0]], nodes=nodes, initializers=[stored])
    model = ir.Model(made, ir_version=10)
    assert [is_stored(node) for node in nodes] == [True, False, False]
    products = [Product("block.scores", "s", 1), Product("block.context", "c", 1)]
    name_products(model, products)
    assert [node.name for node in made] == ["layer", *map(product_node, products)]
    with pytest.raises(ValueError, match="zip"):
        name_products(model, products[:1])


def test_names_survive_the_runtimes_optimizations(graph: fx.GraphModule) -> None:
    made = convert_onnxruntime(planned(graph), None, ONNXRUNTIME.rules)
    executed: onnx.ModelProto = made.module.executed  # type: ignore[attr-defined]
    names = {node.name for node in executed.graph.node}
    assert {product_node(product) for product in products_of(planned(graph)).values()} <= names


class Scaled(nn.Module):
    def __init__(self, factor: object) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh((x @ torch.tanh(x).transpose(1, 2)) * self.factor)


@pytest.mark.parametrize(("factor", "is_taken"), [(0.25, True), (-0.25, False), (2, False)])
def test_a_factor_behind_a_product_becomes_part_of_its_scales(
    factor: object, is_taken: bool, batches: list[Tensor], calibrated: Made
) -> None:
    traced = trace(Scaled(factor), batches[0])
    found = calibrated(traced, batches, "onnxruntime", candidates=CANDIDATES, products=True)
    plan = planned(found)
    rewritten = to_integer_operators(plan, ONNXRUNTIME.rules)
    left = rewritten.graph.find_nodes(op="call_function", target=torch.ops.aten.mul.Tensor)
    assert len(left) == (not is_taken)
    found, expected = run_batch(rewritten, batches[1]), run_batch(plan, batches[1])
    assert agreement_db(expected, found) >= 100  # type: ignore[arg-type]
