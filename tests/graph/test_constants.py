from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from fxmpq.graph.constants import constant_nodes


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        once = self.weight.exp() @ self.weight
        again = self.weight.exp() @ self.weight
        noise = torch.rand_like(self.weight)
        return x @ once + x @ again + x @ noise + self.weight.exp() * x.sum()


def exported() -> fx.GraphModule:
    program = torch.export.export(Mixed().eval(), (torch.randn(3, 3),), strict=False)
    return program.module(check_guards=False)


def test_functions_of_stored_tensors_are_constant_and_chance_is_not() -> None:
    graph = exported()
    found = constant_nodes(graph)
    by_target: dict[str, list[bool]] = {}
    for node in graph.graph.nodes:
        by_target.setdefault(str(node.target), []).append(node in found)
    assert by_target["weight"] == [True]
    assert by_target["aten.exp.default"] == [True] * 3
    assert by_target["aten.matmul.default"] == [True, True, False, False, False]
    assert by_target["aten.rand_like.default"] == [False]
    assert by_target["x"] == [False]


def test_equal_constants_have_one_representative() -> None:
    graph = exported()
    found = constant_nodes(graph)
    products = [node for node in graph.graph.nodes if str(node.target) == "aten.matmul.default"]
    assert found[products[1]] is products[0] is found[products[0]]
    assert list(found) == [node for node in graph.graph.nodes if node in found]
