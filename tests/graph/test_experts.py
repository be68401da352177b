from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fxmpq.graph.experts import batched_linear, expert_matrices, grouped_linear, grouped_outer

own = torch.ops.fxmpq


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def by_row(x: Tensor, weight: Tensor, ends: list[int], out: int) -> Tensor:
    """Each row times its expert's matrix, one at a time."""
    found = torch.zeros(len(x), out)
    for row, values in enumerate(x):
        expert = sum(row >= end for end in ends)
        if expert < len(ends):
            found[row] = weight[expert * out : (expert + 1) * out] @ values
    return found


@given(
    sizes=st.lists(st.integers(0, 4), min_size=1, max_size=4),
    left=st.integers(0, 2),
    width=st.integers(1, 4),
    out=st.integers(1, 3),
    is_turned=st.booleans(),
)
def test_every_row_meets_its_own_expert(
    sizes: list[int], left: int, width: int, out: int, is_turned: bool
) -> None:
    ends = torch.tensor(sizes).cumsum(0)
    x, weight = draw(int(ends[-1]) + left, width), draw(len(sizes) * out, width)
    found = grouped_linear(x, weight, ends, is_turned)
    assert torch.allclose(found, by_row(x, weight, ends.tolist(), out), atol=1e-5)


@given(sizes=st.lists(st.integers(0, 4), min_size=1, max_size=4))
def test_the_outer_product_is_the_weights_gradient(sizes: list[int]) -> None:
    ends = torch.tensor(sizes).cumsum(0)
    x, gradient = draw(int(ends[-1]), 3), draw(int(ends[-1]), 2)
    found = expert_matrices(grouped_outer(gradient, x, ends), len(sizes))
    for expert, (start, end) in enumerate(zip([0, *ends.tolist()], ends.tolist(), strict=False)):
        assert torch.allclose(found[expert], gradient[start:end].T @ x[start:end], atol=1e-5)


def test_gradients_of_first_and_second_order() -> None:
    x, weight = draw(5, 3).double().requires_grad_(), draw(4, 3).double().requires_grad_()
    ends = torch.tensor([2, 4])

    def run(x: Tensor, weight: Tensor) -> Tensor:
        return own.grouped_linear(x, weight, ends, False)

    assert torch.autograd.gradcheck(run, (x, weight))
    assert torch.autograd.gradgradcheck(run, (x, weight))


def test_the_operators_keep_their_contracts() -> None:
    ends = torch.tensor([1, 3], dtype=torch.int32)
    for is_turned in (False, True):
        operands = (draw(3, 4).requires_grad_(), draw(6, 4).requires_grad_(), ends, is_turned)
        torch.library.opcheck(own.grouped_linear.default, operands)
    torch.library.opcheck(own.grouped_outer.default, (draw(3, 2), draw(3, 4), ends))
    batched = (draw(2, 5, 4), draw(6, 4), None, 2, "turned")
    torch.library.opcheck(own.batched_linear.default, batched)


@pytest.mark.parametrize("shape", [(5, 4), (1, 5, 4), (3, 5, 4), (2, 3, 5, 4)])
def test_a_batched_product_is_one_of_each_batch(shape: tuple[int, ...]) -> None:
    x, weight = draw(*shape), draw(3 * 2, 4)
    matrices = expert_matrices(weight, 3)
    expected = torch.matmul(x, matrices.mT)
    assert torch.equal(batched_linear(x, weight, None, 3, "plain"), expected)
    stored = matrices.mT.contiguous()
    assert torch.equal(batched_linear(x, weight, None, 3, "turned"), torch.matmul(x, stored))
    behind = torch.matmul(matrices, x.mT).mT
    assert torch.equal(batched_linear(x, weight, None, 3, "behind"), behind)
    assert torch.allclose(expected, behind, atol=1e-5)


def test_a_summand_is_added_as_baddbmm_does() -> None:
    x, weight, summand = draw(3, 5, 4), draw(6, 4), draw(3, 1, 2)
    stored = expert_matrices(weight, 3).mT.contiguous()
    found = batched_linear(x, weight, summand, 3, "turned")
    assert torch.equal(found, torch.baddbmm(summand, x, stored))


def test_rows_of_a_narrower_type_are_multiplied_in_it() -> None:
    x, weight, ends = draw(3, 4).bfloat16(), draw(6, 4), torch.tensor([1, 3])
    assert grouped_linear(x, weight, ends, False).dtype is torch.bfloat16
