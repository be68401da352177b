from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

from fxmpq.calibration.calibrate import calibrate
from fxmpq.graph.attributes import get_tensor
from fxmpq.graph.prepare import insert_quantizers
from fxmpq.graph.run import run_batch
from fxmpq.graph.trace import trace
from fxmpq.targets.decomposed import to_decomposed
from fxmpq.targets.inductor import INDUCTOR
from fxmpq.targets.inductor.joined import join_linears
from fxmpq.targets.inductor.program import inductor_program
from fxmpq.targets.lowering import finish

Made = Callable[..., fx.GraphModule]
aten = torch.ops.aten


class Heads(nn.Module):
    """Three layers that read the same, whose results are taken apart, and one on the result."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(8, 8), nn.Linear(8, 8)
        self.value, self.out = nn.Linear(8, 4), nn.Linear(4, 8)

    def forward(self, x: Tensor) -> Tensor:
        query, key = (layer(x).view(2, 5, 2, 4).transpose(1, 2) for layer in (self.query, self.key))
        value = self.value(x).view(2, 5, 2, 2).transpose(1, 2)
        mixed = torch.softmax(query @ key.transpose(-1, -2), -1) @ value
        return self.out(mixed.transpose(1, 2).reshape(2, 5, 4))


def inputs() -> Tensor:
    return torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))


def linears(graph: fx.GraphModule) -> list[fx.Node]:
    return graph.graph.find_nodes(op="call_function", target=aten.linear.default)


@pytest.mark.parametrize("bias", [True, False])
def test_queries_keys_and_values_are_one_product(
    calibrated: Made, uniform: Made, bias: bool
) -> None:
    torch.manual_seed(0)
    x = inputs()
    planned = uniform(calibrated(trace(Heads(), x), [x], "inductor"))
    graph = to_decomposed(planned, signed=False)
    if not bias:
        for linear in linears(graph):
            linear.args = linear.args[:2]
        graph.recompile()
    before = run_batch(graph, x)[0]
    scales = [str(linear.args[1].args[1].target) for linear in linears(graph)]
    expected = torch.cat([get_tensor(graph, name) for name in scales[:3]])
    found = join_linears(graph)
    finish(graph)
    assert list(found.values()) == [scales[:3]]
    [joined] = found
    assert torch.equal(get_tensor(graph, joined), expected)
    first, second = linears(graph)
    assert get_tensor(graph, str(first.args[1].args[0].target)).shape == (20, 8)
    assert len(first.args) == 2 + bias
    assert [user.args[1:] for user in first.users] == [(-1, 0, 8), (-1, 8, 16), (-1, 16, 20)]
    assert get_tensor(graph, str(second.args[1].args[0].target)).shape == (8, 4)
    torch.testing.assert_close(run_batch(graph, x)[0], before)


def test_all_layers_are_known_by_the_joined_scales(calibrated: Made, uniform: Made) -> None:
    torch.manual_seed(0)
    x = inputs()
    program = inductor_program(uniform(calibrated(trace(Heads(), x), [x], "inductor")))
    assert sorted(program.marks.values()) == [["out"], ["query", "key", "value"]]
    tensors = dict(program.graph.named_buffers())
    assert [len(tensors[mark]) for mark in program.marks] == [8, 20]


class Apart(nn.Module):
    """Layers that read the same, of which one goes on into an activation, and one is float."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.plain = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.left(x).relu(), self.right(x).view(10, 8), self.plain(x).view(10, 8)


def test_what_is_fused_or_float_stays_apart(calibrated: Made, uniform: Made) -> None:
    torch.manual_seed(0)
    x = inputs()
    planned = uniform(calibrated(trace(Apart(), x), [x], "inductor", exclude=["plain"]))
    graph = to_decomposed(planned, signed=False)
    before = [node.name for node in graph.graph.nodes]
    assert join_linears(graph) == {}
    assert [node.name for node in graph.graph.nodes] == before


class Flattened(nn.Module):
    """Two layers whose results are views that go over several rows."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        left, right = self.left(x).view(2, 5, 2, 4).view(2, 40), self.right(x).view(80)
        return left, right


class Strided(Flattened):
    """Reads every second row of a result by where it lies in memory."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        left = torch.as_strided(self.left(x).view(10, 8), (5, 8), (16, 1))
        return left, self.right(x).view(10, 8)


class Shifted(Flattened):
    """The second layer's bias is computed from the first one's result."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        left = self.left(x).view(10, 8)
        return left, nn.functional.linear(x, self.right.weight, left.sum(0)).view(10, 8)


class Spread(Flattened):
    """Biases of one number for all channels."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Parameter(torch.ones(1)), nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        left = nn.functional.linear(x, self.left.weight, self.one)
        return left.view(10, 8), nn.functional.linear(x, self.right.weight, self.other).view(10, 8)


@pytest.mark.parametrize(
    ("model", "is_joined"),
    [(Flattened, True), (Strided, False), (Shifted, False), (Spread, False)],
)
def test_results_are_the_same_however_they_are_read(
    uniform: Made, model: type[nn.Module], is_joined: bool
) -> None:
    torch.manual_seed(0)
    x = inputs()
    prepared = insert_quantizers(trace(model(), x), INDUCTOR.rules)
    planned = uniform(calibrate(prepared, [x], bias_correction=False, progress=False))
    program = inductor_program(planned)
    together = [["left", "right"]] if is_joined else [["left"], ["right"]]
    assert sorted(program.marks.values()) == together
    for found, expected in zip(program.graph(x), run_batch(planned, x), strict=True):
        torch.testing.assert_close(found, expected)
