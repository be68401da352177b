from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from fxmpq.formats import Precision
from fxmpq.graph.asked_products import AskedProducts
from fxmpq.graph.groups import form_groups
from fxmpq.graph.layers import find_layers
from fxmpq.graph.products import find_products
from fxmpq.graph.rules import TargetRules
from fxmpq.graph.sites import find_sites
from fxmpq.graph.trace import trace
from fxmpq.targets.reference import REFERENCE


class Product(nn.Module):
    """A product of a layer's result and of what that layer reads."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x @ torch.relu(self.fc(x)).transpose(1, 2)


def test_both_operands_of_a_product_are_sites_that_it_alone_reads() -> None:
    graph = trace(Product(), torch.randn(2, 3, 4))
    asked = AskedProducts(find_products(graph))
    layers, rules = find_layers(graph).layers, REFERENCE.rules
    groups = form_groups(graph, layers, rules, [Precision(8, 8)], {}, (), asked=asked).groups
    sites = {site.value.name: site for site in find_sites(graph, groups, rules, ())}
    assert {name: site.group for name, site in sites.items()} == {"x": "fc", "transpose": "fc"}
    assert {reader.name for reader in sites["x"].readers or ()} == {"linear", "matmul"}
    assert {reader.name for reader in sites["transpose"].readers or ()} == {"matmul"}


def test_a_product_that_stays_float_has_no_sites() -> None:
    graph = trace(Product(), torch.randn(2, 3, 4))
    asked = AskedProducts(find_products(graph))
    layers, rules = find_layers(graph).layers, REFERENCE.rules
    candidates = [Precision(8, 8)]
    groups = form_groups(graph, layers, rules, candidates, {}, ["matmul"], asked=asked).groups
    assert [site.value.name for site in find_sites(graph, groups, rules, ())] == ["x"]


def test_a_site_of_two_kinds_is_symmetric_for_one_of_them() -> None:
    """A linear layer and a product read `x`, the product alone its transpose."""
    graph = trace(Product(), torch.randn(2, 3, 4))
    asked = AskedProducts(find_products(graph))
    layers = find_layers(graph).layers
    groups = form_groups(
        graph, layers, REFERENCE.rules, [Precision(8, 8)], {}, (), asked=asked
    ).groups
    found = {
        kind: {
            site.value.name
            for site in find_sites(
                graph, groups, replace(REFERENCE.rules, symmetric_inputs_of=frozenset({kind})), ()
            )
            if site.is_symmetric
        }
        for kind in ("linear", "matmul", "embedding")
    }
    assert found == {"linear": {"x"}, "matmul": {"x", "transpose"}, "embedding": set()}


class Heads(nn.Module):
    """Two heads whose products read views of linear layers, one view read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.out = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        query = self.query(x).view(2, 5, 2, 4).transpose(1, 2)
        key = self.key(x).view(2, 5, 2, 4).transpose(1, 2)
        weights = torch.softmax(torch.matmul(query, key.transpose(2, 3)), -1)
        context = torch.matmul(weights, key)
        return self.out(context.transpose(1, 2).reshape(2, 5, 8))


def test_operands_of_products_are_stored_where_they_are_computed() -> None:
    graph = trace(Heads(), torch.randn(2, 5, 8))
    asked = AskedProducts(find_products(graph))
    layers = find_layers(graph).layers
    base = replace(REFERENCE.rules, symmetric_inputs_of=frozenset({"matmul"}))
    groups = form_groups(graph, layers, base, [Precision(8, 8)], {}, (), asked=asked).groups

    def found(rules: TargetRules) -> dict[str, bool]:
        sites = find_sites(graph, groups, rules, ())
        return {site.value.name: site.is_symmetric for site in sites}

    # The linear layer behind reads its own view, the one that is read twice is stored itself.
    behind = {"x": False, "reshape": False}
    assert found(base) == {
        "transpose": True,
        "transpose_1": True,
        "transpose_2": True,
        "softmax": True,
        **behind,
    }
    views = frozenset({torch.ops.aten.view.default, torch.ops.aten.transpose.int})
    rules = replace(base, product_through=views, unsigned_outputs_of=frozenset({"softmax"}))
    assert found(rules) == {"linear": True, "transpose_1": True, "softmax": False, **behind}


class Swapped(nn.Module):
    """What is never negative comes first in one product, and second in another."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        first, second = x.relu(), y.relu()
        return torch.matmul(first, y), torch.matmul(x, second.transpose(1, 2))


def test_only_first_operands_of_products_are_unsigned() -> None:
    graph = trace(Swapped(), (torch.randn(2, 4, 4), torch.randn(2, 4, 4)))
    asked = AskedProducts(find_products(graph))
    rules = replace(
        REFERENCE.rules,
        symmetric_inputs_of=frozenset({"matmul"}),
        unsigned_outputs_of=frozenset({"relu"}),
        product_through=frozenset({torch.ops.aten.transpose.int}),
    )
    groups = form_groups(graph, (), rules, [Precision(8, 8)], {}, (), asked=asked).groups
    sites = find_sites(graph, groups, rules, ())
    found = {site.value.name: site.is_symmetric for site in sites}
    assert found == {"x": True, "y": True, "relu": False, "relu_1": True}
