from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fxmpq.graph.passes.restore_batch_norm import restore_batch_norm
from fxmpq.graph.trace import trace

aten = torch.ops.aten


class WritesAfterNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x))
        x[:, :2] *= 2
        return x


def test_functionalized_norms_become_batch_norms(randomize: Callable[..., nn.Module]) -> None:
    model = randomize(WritesAfterNorm())
    x = torch.randn(2, 3, 6, 6)
    with torch.no_grad():
        program = torch.export.export(model, (x,), strict=False).run_decompositions({})
        graph = program.module(check_guards=False)
        assert aten.batch_norm.default not in {node.target for node in graph.graph.nodes}
        assert restore_batch_norm(graph) == 1
        (norm,) = [n for n in graph.graph.nodes if n.target is aten.batch_norm.default]
        assert norm.meta["nn_module_stack"]
        assert norm.meta["val"].shape == (2, 4, 4, 4)
        assert torch.allclose(graph(x), model(x))
        assert restore_batch_norm(graph) == 0


def test_traced_models_fold_them(randomize: Callable[..., nn.Module]) -> None:
    model = randomize(WritesAfterNorm())
    x = torch.randn(3, 3, 6, 6)
    graph = trace(model, x)
    assert not any("batch_norm" in str(node.target) for node in graph.graph.nodes)
    with torch.no_grad():
        assert torch.allclose(graph(x), model(x), atol=1e-5)
