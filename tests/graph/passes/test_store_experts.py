from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn
from transformers import MixtralConfig, MixtralForCausalLM

from fxmpq.graph.attributes import get_tensor
from fxmpq.graph.layers import find_layers
from fxmpq.graph.passes.store_experts import store_experts
from fxmpq.graph.trace import trace

own = torch.ops.fxmpq


class Stored(nn.Module):
    def __init__(self, shape: tuple[int, ...], forward: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
        self._forward = forward

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(x.transpose(0, 1), self.weight)


def batch(samples: int = 3) -> Tensor:
    return torch.randn(samples, 4, 6, generator=torch.Generator().manual_seed(samples))


def targets(graph: fx.GraphModule) -> list[object]:
    return [node.target for node in graph.graph.nodes if node.op == "call_function"]


BATCHED: dict[str, tuple[tuple[int, ...], Callable[[Tensor, Tensor], Tensor]]] = {
    "bmm": ((4, 6, 5), torch.bmm),
    "matmul": ((4, 6, 5), torch.matmul),
    "turned": ((4, 5, 6), lambda x, w: x @ w.transpose(1, 2)),
    "mT": ((4, 5, 6), lambda x, w: torch.bmm(x, w.mT)),
    "permuted": ((4, 5, 6), lambda x, w: x @ w.permute(0, 2, 1)),
    "behind": ((4, 5, 6), lambda x, w: torch.bmm(w, x.transpose(1, 2))),
    "broadcast": ((2, 6, 5), lambda x, w: x.unsqueeze(1) @ w),
    "summand": ((4, 6, 5), lambda x, w: torch.baddbmm(x[..., :5], x, w)),
    "slice": ((4, 6, 9), lambda x, w: torch.bmm(x, w[:, :, 2:7])),
    "twice": ((4, 6, 6), lambda x, w: torch.bmm(torch.bmm(x, w), w)),
}


@pytest.mark.parametrize("name", BATCHED)
def test_a_batched_product_keeps_its_bits(name: str) -> None:
    shape, forward = BATCHED[name]
    model = Stored(shape, forward).eval()
    graph = trace(model, batch())
    count = 2 if name == "twice" else 1
    assert targets(graph).count(own.batched_linear.default) == count
    layers = find_layers(graph).layers
    assert [layer.kind for layer in layers] == ["experts"] * count
    outputs = 6 if name == "twice" else 5
    assert layers[0].weight_shape == (shape[0] * outputs, 6)
    for samples in (2, 5):
        assert torch.equal(graph(batch(samples)), model(batch(samples)))
    factor = 2 if name == "broadcast" else 1
    assert layers[0].macs == 4 * factor * outputs * 6


OTHERS: dict[str, tuple[tuple[int, ...], Callable[[Tensor, Tensor], Tensor]]] = {
    "both ways": ((4, 6, 6), lambda x, w: torch.bmm(torch.bmm(x, w), w.mT)),
    "read elsewhere": ((4, 6, 5), lambda x, w: torch.bmm(x, w) / w.norm()),
    "turned behind": ((4, 6, 5), lambda x, w: torch.bmm(w.mT, x.mT)),
    "four dimensions": ((1, 4, 6, 5), lambda x, w: x @ w),
    "vector behind": ((4, 5, 6), lambda x, w: (w @ x.mean((0, 1))) + x[:, :, :5].mT.mean()),
    "half": ((4, 6, 5), lambda x, w: torch.bmm(x.bfloat16(), w.bfloat16())),
    "keywords": ((4, 6, 5), lambda x, w: torch.baddbmm(x[..., :5], x, w, alpha=2)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_cannot_be_stored_so_stays(name: str) -> None:
    shape, forward = OTHERS[name]
    model = Stored(shape, forward).eval()
    graph = trace(model, batch())
    assert own.batched_linear.default not in targets(graph)
    assert torch.equal(graph(batch(5)), model(batch(5)))


class Grouped(nn.Module):
    """The operator of transformers, with experts stored in either layout."""

    def __init__(self, *, is_turned: bool) -> None:
        super().__init__()
        shape = (3, 8, 4) if is_turned else (3, 4, 8)
        self.weight = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
        self.is_turned = is_turned

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        weight = self.weight if self.is_turned else self.weight.transpose(1, 2)
        return torch.ops.transformers.grouped_mm_fallback(x, weight, ends)


@pytest.mark.parametrize("is_turned", [True, False])
def test_a_grouped_product_keeps_its_bits(is_turned: bool) -> None:
    model = Grouped(is_turned=is_turned).eval()
    x, ends = torch.randn(9, 8), torch.tensor([2, 2, 9], dtype=torch.int32)
    program = torch.export.export(model, (x, ends), strict=False)
    graph = program.module(check_guards=False)
    with torch.no_grad():
        assert store_experts(graph) == 1
        assert store_experts(graph) == 0
        assert targets(graph).count(own.grouped_linear.default) == 1
        assert get_tensor(graph, "weight").shape == (12, 8)
        assert get_tensor(graph, "weight").requires_grad
        assert torch.equal(graph(x, ends), model(x, ends))


def test_all_experts_of_mixtral_are_layers_bit_for_bit() -> None:
    config = MixtralConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=3,
        use_cache=False,
    )
    model = MixtralForCausalLM(config).eval()
    ids = torch.randint(0, 32, (2, 6), generator=torch.Generator().manual_seed(0))
    graph = trace(model, {"input_ids": ids})
    layers = {layer.name: layer for layer in find_layers(graph).layers if layer.kind == "experts"}
    up, down = (f"model.layers.0.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj"))
    assert list(layers) == [up, down]
    assert layers[up].weight_shape == (3 * 48, 16)
    # Six tokens of a sample go to two experts each.
    assert layers[up].macs == 6 * 2 * 48 * 16
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    assert torch.equal(graph(input_ids=ids).logits, expected)
