from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_flatten

from fxmpq.graph.findings import Join
from fxmpq.graph.layers import find_layers
from fxmpq.graph.products import find_products, product_operands, shared_operands
from fxmpq.graph.state import GraphState, Product, with_state
from fxmpq.graph.trace import trace

aten = torch.ops.aten


class Heads(nn.Module):
    """Products of every kind on one input, in a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Products()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class Products(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        turned = x.transpose(1, 2)
        one = torch.matmul(x, turned)
        two = torch.bmm(one, x)
        three = torch.baddbmm(x, one, two, beta=0.5, alpha=2.0)
        rows, columns = three.flatten(0, 1), two.flatten(0, 1)
        return torch.addmm(rows, torch.mm(rows, columns.t()), columns)


def test_every_kind_of_product_is_found_and_named_after_its_place() -> None:
    graph = trace(Heads(), torch.randn(3, 5, 4))
    found = find_products(graph)
    assert [product.name for product in found] == [
        "inner.matmul",
        "inner.bmm",
        "inner.baddbmm",
        "inner.mm",
        "inner.addmm",
    ]
    nodes = {node.name: node for node in graph.graph.nodes}
    assert all(len(product_operands(nodes[product.node])) == 2 for product in found)
    # The graph's own example has two samples.
    assert [product.macs for product in found] == [5 * 4 * 5] * 3 + [10 * 4 * 10 // 2] * 2


def test_further_products_of_a_place_are_numbered() -> None:
    class Twice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x @ x.transpose(1, 2)) @ x

    found = find_products(trace(Twice(), torch.randn(2, 3, 4)))
    assert [product.name for product in found] == ["matmul", "matmul#2"]


class Stored(nn.Module):
    """Products of a stored operand, of other numbers, and with a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(1, 4, 5))
        self.vector = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        stored = torch.bmm(x, self.table.expand(x.shape[0], -1, -1)).sum()
        double = (x.double() @ x.double().transpose(1, 2)).float().sum()
        return x @ x[0, 0] * self.vector[0] + stored + double


def test_stored_operands_vectors_and_other_numbers_are_no_products() -> None:
    graph = trace(Stored(), torch.randn(2, 3, 4))
    targets = [node.target for node in graph.graph.nodes]
    assert targets.count(aten.matmul.default) == 2
    assert find_products(graph) == ()


def test_a_graph_without_products_has_none(conv_graph: fx.GraphModule) -> None:
    assert find_products(conv_graph) == ()
    assert all(product_operands(node) == () for node in conv_graph.graph.nodes)


@given(*(st.integers(2, 5) for _ in range(4)))
def test_multiply_accumulates_are_the_products_of_the_sizes(
    batch: int, rows: int, inner: int, columns: int
) -> None:
    graph = fx.Graph()
    left, right = graph.placeholder("left"), graph.placeholder("right")
    sizes = ((batch, rows, inner), (batch, inner, columns))
    for node, shape in zip((left, right), sizes, strict=True):
        node.meta = {"val": torch.empty(shape, device="meta"), "example_shape": torch.Size(shape)}
    product = graph.create_node("call_function", aten.bmm.default, (left, right), name="bmm")
    product.meta = {"example_shape": torch.Size((batch, rows, columns))}
    graph.output(product)
    module = fx.GraphModule(nn.Module(), graph)
    example, spec = tree_flatten(((torch.empty(sizes[0]), torch.empty(sizes[1])), {}))
    with_state(module, GraphState(spec, tuple(example), False, ""))
    assert find_products(module) == (Product("bmm", "bmm", rows * inner * columns),)


class Meets(nn.Module):
    """A product that reads what a layer reads, one that reads what it computes, and one alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        near = torch.matmul(x, hidden.transpose(1, 2))
        far = torch.bmm(near, hidden)
        return self.second(far) + far.transpose(1, 2).flatten(1).sum()


@pytest.mark.parametrize("reverses", [False, True])
def test_products_are_joined_to_what_reads_their_operands(reverses: bool) -> None:
    graph = trace(Meets(), torch.randn(2, 3, 4))
    members = [*find_layers(graph).layers, *find_products(graph)]
    order = [node.name for node in graph.graph.nodes]
    members.sort(key=lambda member: order.index(member.node), reverse=reverses)
    pair = ("matmul", "first") if not reverses else ("first", "matmul")
    assert shared_operands(graph, members) == [Join("shared_input", *pair)]


def test_layers_alone_are_joined_by_other_rules(bert_graph: fx.GraphModule) -> None:
    assert shared_operands(bert_graph, find_layers(bert_graph).layers) == []
