from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fxmpq.graph.aliases import is_in_place, writes_through_views
from fxmpq.graph.trace import trace


class WritesSlice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x = x * 1
        x[:, :2] *= 2
        return x + 1


class WritesBaseOfView(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x = x * 1
        view = x.view(-1, 2)
        x.add_(1)
        return view * 3


class FillsMask(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        mask = torch.zeros(4)
        for index in range(4):
            mask[index] = index
        return x + mask


class ReadsViewBefore(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x = x * 1
        early = x.view(-1, 2) * 2
        return torch.relu_(x).sum() + early


class ReluOnView(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu_((x * 1).view(-1, 2)).mul_(2)


class ViewAfterwards(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x = x * 1
        x.relu_()
        x.add_(1)
        return x.view(-1, 2)


ALIASED = [WritesSlice, WritesBaseOfView, FillsMask]
CLEAR = [ReadsViewBefore, ReluOnView, ViewAfterwards]


def exported(model: nn.Module) -> torch.export.ExportedProgram:
    return torch.export.export(model, (torch.ones(2, 4),), strict=False)


@pytest.mark.parametrize("model", ALIASED)
def test_a_write_that_another_name_sees_is_found(model: type[nn.Module]) -> None:
    assert writes_through_views(exported(model()))


@pytest.mark.parametrize("model", CLEAR)
def test_a_write_that_no_other_name_sees_is_not(model: type[nn.Module]) -> None:
    assert not writes_through_views(exported(model()))


@pytest.mark.parametrize("model", [*ALIASED, *CLEAR])
def test_the_traced_graph_computes_what_the_model_does(model: type[nn.Module]) -> None:
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    graph = trace(model(), x)
    assert not any(is_in_place(node) for node in graph.graph.nodes)
    assert torch.allclose(graph(x), model()(x))


def test_in_place_operators_are_told_by_their_schema() -> None:
    program = exported(ViewAfterwards())
    targets = [str(node.target) for node in program.graph.nodes if is_in_place(node)]
    assert targets == ["aten.relu_.default", "aten.add_.Tensor"]
