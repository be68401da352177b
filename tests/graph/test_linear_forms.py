from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from fxmpq.graph.linear_forms import FORMS


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@given(
    form=st.sampled_from(sorted(FORMS)),
    lead=st.lists(st.integers(0, 3), min_size=1, max_size=3),
    width=st.integers(1, 5),
    out=st.integers(1, 4),
    has_bias=st.booleans(),
)
def test_every_form_is_a_linear_layer(
    form: str, lead: list[int], width: int, out: int, has_bias: bool
) -> None:
    x, weight = draw(*lead, width), draw(out, width)
    bias = draw(out) if has_bias else None
    found = torch.ops.fxmpq.linear(x, weight, bias, form)
    assert found.shape == (*lead, out)
    assert torch.allclose(found, functional.linear(x, weight, bias), atol=1e-5)


def test_each_form_has_the_bits_of_the_product_it_is_named_after() -> None:
    x, weight = draw(4, 33, 20), draw(12, 20)
    linear = torch.ops.fxmpq.linear
    rows = x.reshape(1, -1, 20)
    assert torch.equal(linear(x, weight, None, "behind"), (weight @ x.mT).mT)
    assert torch.equal(
        linear(x, weight, None, "batched"), torch.bmm(rows, weight.T[None]).reshape(4, 33, 12)
    )
    assert torch.equal(
        linear(x, weight, None, "batched_behind"),
        torch.bmm(weight[None], rows.mT).mT.reshape(4, 33, 12),
    )


@pytest.mark.parametrize("form", FORMS)
def test_forms_have_gradients_and_export(form: str) -> None:
    x, weight, bias = (
        entry.double().requires_grad_() for entry in (draw(3, 2), draw(2, 2), draw(2))
    )

    def run(*operands: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = torch.ops.fxmpq.linear(*operands, form)
        return found

    assert torch.autograd.gradcheck(run, (x, weight, bias))
    torch.library.opcheck(torch.ops.fxmpq.linear.default, (draw(3, 2), draw(2, 2), None, form))


def test_an_unknown_form_is_an_error() -> None:
    with pytest.raises(KeyError):
        torch.ops.fxmpq.linear(draw(3, 2), draw(2, 2), None, "sideways")
