from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from fxmpq.formats import Precision
from fxmpq.graph.run import run_batch
from fxmpq.graph.trace import trace
from fxmpq.targets.onnxruntime import ONNXRUNTIME
from fxmpq.targets.onnxruntime.convert import convert_onnxruntime
from fxmpq.targets.onnxruntime.product_masks import _hidden_beside, apply_masks_as_terms
from fxmpq.targets.onnxruntime.rewrite import to_integer_operators
from fxmpq.targets.target import agreement_db

Made = Callable[..., fx.GraphModule]

aten = torch.ops.aten

INFINITE = float("-inf")
LEAST = torch.finfo(torch.float32).min
WHERE = aten.where.ScalarOther
SIZES = (2, 3, 4, 4)


class Masked(nn.Module):
    """A product with a mask on it, and something that reads the mask too."""

    def __init__(self, other: float) -> None:
        super().__init__()
        self.other = other

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        product = torch.matmul(x, x)
        return torch.softmax(WHERE(mask, product, self.other), -1) + WHERE(~mask, x, 1.0)


def example(*mask: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(SIZES, generator=generator)
    left = torch.rand(mask, generator=generator) > 0.5
    left[..., 0] = True
    return x, left


def rewritten(
    graph: fx.GraphModule, largest: float, sizes: tuple[int, ...] = SIZES
) -> fx.GraphModule:
    product = graph.graph.find_nodes(op="call_function", target=aten.matmul.default)[0]
    apply_masks_as_terms(graph.graph, product, torch.Size(sizes), largest)
    graph.graph.lint()
    graph.recompile()
    return graph


def count(graph: fx.GraphModule, target: object) -> int:
    return sum(node.target is target for node in graph.graph.nodes)


@pytest.mark.parametrize("mask", [(2, 1, 1, 4), (2, 1, 4, 4), (4, 4)])
@pytest.mark.parametrize("other", [LEAST, INFINITE, -1e30])
def test_a_number_that_hides_the_product_becomes_a_term_with_the_same_bits(
    mask: tuple[int, ...], other: float
) -> None:
    tensors = example(*mask)
    graph = trace(Masked(other), tensors)
    expected = graph(*tensors)
    assert torch.equal(rewritten(graph, largest=1e4)(*tensors), expected)
    # The other `where` reads no product.
    assert [count(graph, target) for target in (WHERE, aten.where.Scalar)] == [1, 1]


def test_a_mask_of_zeros_becomes_a_factor() -> None:
    tensors = example(2, 1, 4, 1)
    graph = trace(Masked(0.0), tensors)
    expected = graph(*tensors)
    assert torch.equal(rewritten(graph, largest=1e38)(*tensors), expected)
    assert count(graph, WHERE) == 1


@pytest.mark.parametrize(
    ("other", "largest", "mask"),
    [
        (-1e9, 1e4, (2, 1, 1, 4)),  # a product of some thousand shows beside it
        (math.nan, 1e4, (2, 1, 1, 4)),
        (LEAST, 1e31, (2, 1, 1, 4)),
        (INFINITE, 1e39, (2, 1, 1, 4)),  # a product that may overflow is not finite
        (0.0, 1e39, (2, 1, 1, 4)),
        (0.0, math.nan, (2, 1, 1, 4)),
        (LEAST, 1e4, SIZES),  # no smaller than the product
        (0.0, 1e4, SIZES),
    ],
)
def test_what_would_change_or_gain_nothing_stays_as_it_is(
    other: float, largest: float, mask: tuple[int, ...]
) -> None:
    graph = trace(Masked(other), example(*mask))
    code = graph.code
    assert rewritten(graph, largest).code == code
    assert count(graph, WHERE) == 2


class Scaled(nn.Module):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return WHERE(mask, torch.matmul(x, x) * 4.0, -1e30) * 0.5


@pytest.mark.parametrize(("largest", "stays"), [(2.0**71, False), (2.0**72, True)])
def test_a_product_may_be_multiplied_by_a_number(largest: float, stays: bool) -> None:
    # Numbers of 24 bits below 2^100 lie 2^76 apart, or half of that where they get finer.
    assert _hidden_beside(-1e30) == 2.0**74
    tensors = example(2, 1, 1, 4)
    graph = trace(Scaled(), tensors)
    expected = graph(*tensors)
    assert torch.equal(rewritten(graph, largest)(*tensors), expected)
    assert count(graph, WHERE) == stays


class Sides(nn.Module):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        product = torch.matmul(x, x)
        return torch.where(mask, x, product) + torch.where(mask, product, x)


def test_only_a_choice_between_the_product_and_a_number_is_replaced() -> None:
    graph = trace(Sides(), example(2, 1, 1, 4))
    code = graph.code
    assert rewritten(graph, 1.0).code == code


positive = st.floats(2.0**-100, float(np.finfo(np.float32).max), width=32)


@given(
    other=positive, share=st.floats(0.5, 0.999), signs=st.tuples(*[st.sampled_from([-1, 1])] * 2)
)
def test_what_is_hidden_beside_a_number_does_not_change_it(
    other: float, share: float, signs: tuple[int, int]
) -> None:
    value = np.float32(signs[0] * other)
    hidden = np.float32(signs[1] * share * _hidden_beside(float(value)))
    assert value + hidden == value
    # Less than eight times as much is seen on one side or on both.
    seen = np.float32(8 * _hidden_beside(float(value)))
    assert value + seen != value or value - seen != value


class Heads(nn.Module):
    def __init__(self, options: str) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.options = options

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        heads = self.fc(x).unflatten(-1, (2, 4)).transpose(1, 2)
        left = mask.bool()[:, None, None, :]
        if self.options == "added":
            left = torch.zeros_like(mask, dtype=x.dtype).masked_fill(~mask.bool(), INFINITE)
            left = left[:, None, None, :]
        causal = self.options == "causal"
        found = nn.functional.scaled_dot_product_attention(
            heads, heads, heads, None if causal else left, is_causal=causal
        )
        return found.transpose(1, 2).flatten(2)


@pytest.mark.parametrize(("options", "terms"), [("mask", 2), ("added", 0), ("causal", 1)])
def test_attention_in_products_is_as_in_the_simulation(
    options: str, terms: int, calibrated: Made, uniform: Made
) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
    batch = {"x": x, "mask": torch.tensor([[1, 1, 0, 1, 0], [0] * 5, [1] * 5])}
    traced = trace(Heads(options).eval(), batch)
    candidates = (Precision(8, 8),)
    plan = uniform(calibrated(traced, [batch], "onnxruntime", candidates=candidates, products=True))
    graph = to_integer_operators(plan, ONNXRUNTIME.rules)
    assert count(plan, WHERE) == terms
    assert count(graph, WHERE) == 0
    made = convert_onnxruntime(plan, None, ONNXRUNTIME.rules)
    kernels = [row.kernel for row in made.layers]
    assert kernels == ["MatMulIntegerToFloat"] * 3
    (found,), (expected,) = made.run(batch), run_batch(plan, batch)
    assert isinstance(expected, Tensor)
    assert agreement_db([expected], [found]) > 35
    assert bool(found[1].any()) is (options == "causal")
