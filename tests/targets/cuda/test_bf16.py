from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

from fxmpq.graph.run import run_batch
from fxmpq.graph.state import copy_graph
from fxmpq.graph.trace import trace
from fxmpq.targets.cuda.bf16 import compute_in_bfloat16
from fxmpq.targets.lowering import finish


class Floats(nn.Module):
    """A convolution, attention, a product of activations and a norm; a product of integers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(4, 8, 3), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.norm(self.conv(x).mT)
        y = nn.functional.scaled_dot_product_attention(y, y, y)
        counts = torch.ones_like(x, dtype=torch.int64)
        return torch.matmul(y, y.mT).softmax(-1), torch.matmul(counts, counts.mT)


@pytest.fixture(scope="module")
def graphs() -> tuple[fx.GraphModule, fx.GraphModule, frozenset[str]]:
    torch.manual_seed(0)
    graph = trace(Floats(), torch.randn(2, 4, 9))
    narrowed = copy_graph(graph)
    places = compute_in_bfloat16(narrowed)
    finish(narrowed)
    return graph, narrowed, places


class Masked(nn.Module):
    """Attention behind a mask that is stored or computed, of bits or of numbers to add."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bits", torch.ones(4, 4, dtype=torch.bool).tril())
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        attend = nn.functional.scaled_dot_product_attention
        x = self.norm(x)
        added = hidden * torch.finfo(torch.float32).min
        return attend(x, x, x, self.bits), attend(x, x, x, attn_mask=added)


def test_rows_that_are_masked_as_a_whole_stay_finite() -> None:
    x = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))
    hidden = torch.zeros(2, 4, 4)
    hidden[:, 1:, 0] = hidden[1, 2] = 1.0
    graph = trace(Masked(), (x, hidden))
    narrowed = copy_graph(graph)
    compute_in_bfloat16(narrowed)
    finish(narrowed)
    assert narrowed.state_dict()["bits"].dtype is torch.bool
    for expected, found in zip(
        run_batch(graph, (x, hidden)), run_batch(narrowed, (x, hidden)), strict=True
    ):
        assert isinstance(found, Tensor)
        torch.testing.assert_close(found, expected, atol=0.02, rtol=0.05)


class Types(fx.Interpreter):
    """The dtypes that operators read, by operator."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.found: dict[str, set[torch.dtype]] = {}

    def run_node(self, n: fx.Node) -> object:
        args = self.fetch_args_kwargs_from_env(n)[0]
        read = {value.dtype for value in args if isinstance(value, Tensor)}
        self.found.setdefault(str(n.target), set()).update(read)
        return super().run_node(n)


def test_products_read_bfloat16_and_norms_do_not(
    graphs: tuple[fx.GraphModule, fx.GraphModule, frozenset[str]],
) -> None:
    _, narrowed, _ = graphs
    types = Types(narrowed)
    types.run(torch.randn(2, 4, 9), enable_io_processing=False)
    assert types.found["aten.conv1d.default"] == {torch.bfloat16}
    assert types.found["aten.scaled_dot_product_attention.default"] == {torch.bfloat16}
    assert types.found["aten.matmul.default"] == {torch.bfloat16, torch.int64}
    assert types.found["aten.layer_norm.default"] == {torch.float32}
    assert types.found["aten.softmax.int"] == {torch.float32}


def test_results_are_those_of_float_within_bfloat16(
    graphs: tuple[fx.GraphModule, fx.GraphModule, frozenset[str]],
) -> None:
    graph, narrowed, _ = graphs
    x = torch.randn(3, 4, 9, generator=torch.Generator().manual_seed(1))
    (expected, counts), (found, same) = run_batch(graph, x), run_batch(narrowed, x)
    assert isinstance(expected, Tensor)
    assert isinstance(found, Tensor)
    assert isinstance(counts, Tensor)
    assert isinstance(same, Tensor)
    assert torch.equal(counts, same)
    assert found.dtype is torch.float32
    assert not torch.equal(found, expected)
    torch.testing.assert_close(found, expected, atol=0.02, rtol=0.05)


def test_places_are_told_as_reports_name_them(
    graphs: tuple[fx.GraphModule, fx.GraphModule, frozenset[str]],
) -> None:
    _, _, places = graphs
    assert places == {"conv.conv1d", "scaled_dot_product_attention", "matmul"}


def test_stored_operands_are_rounded_once(
    graphs: tuple[fx.GraphModule, fx.GraphModule, frozenset[str]],
) -> None:
    graph, narrowed, _ = graphs
    stored = {name: tensor.dtype for name, tensor in narrowed.state_dict().items()}
    assert stored["bfloat16_conv_weight"] is stored["bfloat16_conv_bias"] is torch.bfloat16
    assert "conv.weight" not in stored
    assert graph.state_dict()["conv.weight"].dtype is torch.float32
