from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from fxmpq.graph.passes.drop_identities import drop_identities


def exported(model: nn.Module, *example: Tensor) -> fx.GraphModule:
    program = torch.export.export(model.eval(), example, strict=False)
    return program.module(check_guards=False)


def operators(graph: fx.GraphModule) -> list[str]:
    return [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("dropout", [nn.Dropout, nn.Dropout2d, nn.AlphaDropout])
def test_dropout_of_inference_goes(dropout: type[nn.Module]) -> None:
    x = torch.randn(2, 3, 4, 4)
    graph = exported(nn.Sequential(nn.ReLU(), dropout(0.5), nn.Hardtanh()), x)
    assert drop_identities(graph) == 1
    assert operators(graph) == ["aten.relu.default", "aten.hardtanh.default"]
    assert torch.equal(graph(x), x.clamp(0, 1))


def test_dropout_that_the_model_always_applies_stays() -> None:
    class MonteCarlo(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return functional.dropout(x, 0.5, training=True)

    x = torch.ones(2, 50)
    graph = exported(MonteCarlo(), x)
    assert drop_identities(graph) == 0
    torch.manual_seed(0)
    expected = MonteCarlo()(x)
    torch.manual_seed(0)
    assert torch.equal(graph(x), expected)
    assert set(expected.unique().tolist()) == {0.0, 2.0}


def test_casts_go_only_where_they_change_nothing() -> None:
    class Casts(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            same = x.to(torch.float32).to(x.device)
            return (same + 1).to(torch.float64)

    x = torch.randn(2, 3)
    graph = exported(Casts(), x)
    drop_identities(graph)
    assert [name for name in operators(graph) if "aten.to" in name or "_to_copy" in name] == [
        name for name in operators(graph) if "dtype" in name
    ]
    assert graph(x).dtype is torch.float64
    assert torch.equal(graph(x), (x + 1).double())
    assert len(operators(graph)) == 2


def test_detach_goes() -> None:
    class Detaches(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.detach() * 2

    x = torch.randn(2, 3)
    graph = exported(Detaches(), x)
    drop_identities(graph)
    assert operators(graph) == ["aten.mul.Tensor"]
    assert torch.equal(graph(x), x * 2)


@pytest.mark.parametrize(
    "kind", [nn.Dropout, nn.Dropout2d, nn.AlphaDropout, nn.FeatureAlphaDropout]
)
def test_every_dropout_goes(kind: type[nn.Module]) -> None:
    x = torch.randn(2, 3, 4, 4)
    graph = exported(nn.Sequential(kind(), nn.ReLU()), x)
    drop_identities(graph)
    assert operators(graph) == ["aten.relu.default"]


def test_an_identity_model_returns_its_input() -> None:
    x = torch.randn(2, 3)
    graph = exported(nn.Dropout(0.5), x)
    drop_identities(graph)
    assert operators(graph) == []
    assert torch.equal(graph(x), x)


@pytest.mark.parametrize(
    ("value", "stays"), [(1.0, False), (torch.ones(2, dtype=torch.float64), True)]
)
def test_a_copy_goes_unless_it_casts(value: float | Tensor, stays: bool) -> None:
    class Writes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            out = torch.zeros_like(x)
            out[:, 1] = x[:, 0] * 2 if isinstance(value, float) else value
            return out + x

    x = torch.randn(2, 3)
    program = torch.export.export(Writes().eval(), (x,), strict=False).run_decompositions({})
    graph = program.module(check_guards=False)
    assert "aten.copy.default" in operators(graph)
    drop_identities(graph)
    assert ("aten.copy.default" in operators(graph)) is stays
    assert torch.equal(graph(x), Writes()(x))
