from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn
from transformers import XLNetConfig, XLNetModel

from fxmpq.graph.attributes import get_tensor
from fxmpq.graph.layers import find_layers
from fxmpq.graph.passes.make_linear_einsum import make_linear_einsum
from fxmpq.graph.trace import trace

aten = torch.ops.aten


class Einsum(nn.Module):
    def __init__(self, equation: str, shape: tuple[int, ...], *, behind: bool = False) -> None:
        super().__init__()
        self.equation, self.behind = equation, behind
        self.weight = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: Tensor) -> Tensor:
        operands = (self.weight, x) if self.behind else (x, self.weight)
        return torch.einsum(self.equation, *operands)


def batch(samples: int = 3) -> Tensor:
    return torch.randn(samples, 7, 12, generator=torch.Generator().manual_seed(samples))


def targets(graph: fx.GraphModule) -> list[object]:
    return [node.target for node in graph.graph.nodes if node.op == "call_function"]


# equation, the weight's shape, whether it comes first, the matrix's shape
LINEAR = {
    "heads": ("bth,hnd->btnd", (12, 4, 5), False, (20, 12)),
    "heads in another order": ("bth,hnd->bdtn", (12, 4, 5), False, (20, 12)),
    "output": ("bth,ho->bto", (12, 5), False, (5, 12)),
    "output turned": ("bth,oh->tob", (5, 12), False, (5, 12)),
    "both dimensions": ("bth,oht->bo", (5, 12, 7), False, (5, 84)),
    "both dimensions first": ("bth,tho->bo", (7, 12, 5), False, (5, 84)),
    "weight first": ("hnd,bth->bntd", (12, 4, 5), True, (20, 12)),
    "weight first, both": ("oht,bth->ob", (5, 12, 7), True, (5, 84)),
    "capital letters": ("bTh,hN -> bTN", (12, 4), False, (4, 12)),
}


@pytest.mark.parametrize("name", LINEAR)
def test_a_plain_product_becomes_linear_bit_for_bit(name: str) -> None:
    equation, shape, behind, matrix = LINEAR[name]
    model = Einsum(equation, shape, behind=behind).eval()
    graph = trace(model, batch())
    assert targets(graph).count(torch.ops.fxmpq.linear.default) == 1
    assert aten.einsum.default not in targets(graph)
    assert tuple(get_tensor(graph, "weight").shape) == matrix
    for samples in (0, 2, 5):
        assert torch.equal(graph(batch(samples)), model(batch(samples)))


OTHERS = {
    "an index of both that is kept": ("bth,th->bt", (7, 12)),
    "a batched product": ("bth,tho->bto", (7, 12, 5)),
    "an index summed over one alone": ("bth,hno->bto", (12, 4, 5)),
    "a vector": ("bth,h->bt", (12,)),
    "an outer product": ("bth,o->btho", (5,)),
    "dots": ("...h,ho->...o", (12, 5)),
    "no result": ("bth,ho", (12, 5)),
    "a dimension of one": ("bth,hon->bton", (12, 1, 5)),
    "a broadcast": ("bth,ho->bto", (1, 5)),
    "a repeated index": ("bth,hoo->bto", (12, 4, 4)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_everything_else_stays(name: str) -> None:
    equation, shape = OTHERS[name]
    model = Einsum(equation, shape).eval()
    graph = trace(model, batch())
    assert targets(graph).count(aten.einsum.default) == 1
    assert torch.equal(graph(batch(4)), model(batch(4)))


class Shared(nn.Module):
    def __init__(self, second: str) -> None:
        super().__init__()
        self.second = second
        self.weight = nn.Parameter(torch.randn(12, 12))

    def forward(self, x: Tensor) -> Tensor:
        first = torch.einsum("bth,ho->bto", x, self.weight)
        if self.second == "norm":
            return first / self.weight.norm()
        return torch.einsum(self.second, first, self.weight)


@pytest.mark.parametrize(
    ("second", "expected"), [("bto,op->btp", 2), ("btp,op->bto", 0), ("norm", 0)]
)
def test_a_weight_is_stored_as_one_matrix_for_all_or_not_at_all(second: str, expected: int) -> None:
    model = Shared(second).eval()
    graph = trace(model, batch())
    assert targets(graph).count(torch.ops.fxmpq.linear.default) == expected
    assert torch.equal(graph(batch()), model(batch()))


def test_it_counts_what_it_replaced_and_keeps_training_flags() -> None:
    model = Einsum("bth,ho->bto", (12, 5)).eval()
    model.weight.requires_grad_(False)
    program = torch.export.export(model, (batch(),), strict=False)
    graph = program.module(check_guards=False)
    assert make_linear_einsum(graph) == 1
    assert make_linear_einsum(graph) == 0
    assert not get_tensor(graph, "weight").requires_grad


def test_all_weights_of_xlnet_are_layers() -> None:
    config = XLNetConfig(vocab_size=32, d_model=16, n_layer=1, n_head=2, d_inner=24)
    model = XLNetModel(config).eval()
    ids = torch.randint(0, 32, (2, 6), generator=torch.Generator().manual_seed(0))
    graph = trace(model, {"input_ids": ids})
    names = {layer.name for layer in find_layers(graph).layers}
    assert {f"layer.0.rel_attn.{name}" for name in "qkvor"} <= names
    with torch.no_grad():
        expected = model(input_ids=ids).last_hidden_state
    assert torch.equal(graph(input_ids=ids).last_hidden_state, expected)
