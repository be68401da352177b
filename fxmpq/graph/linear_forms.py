"""Linear layers that models write as other products, computed as the models do.

A product of an activation and a stored matrix is a linear layer however it is written, but the
kernel behind `bmm` or `W @ x.T` adds up in another order than that of `linear`, and gives other
last bits. `torch.ops.fxmpq.linear` takes a linear layer's arguments and the form that the model
wrote it in, and so is both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor


def _behind(x: Tensor, weight: Tensor) -> Tensor:
    return torch.matmul(weight, x.mT).mT


def _batched(x: Tensor, weight: Tensor) -> Tensor:
    rows = x.reshape(1, -1, x.shape[-1])
    return torch.bmm(rows, weight.T.unsqueeze(0)).reshape(*x.shape[:-1], len(weight))


def _batched_behind(x: Tensor, weight: Tensor) -> Tensor:
    rows = x.reshape(1, -1, x.shape[-1])
    return torch.bmm(weight.unsqueeze(0), rows.mT).mT.reshape(*x.shape[:-1], len(weight))


FORMS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "behind": _behind,
    "batched": _batched,
    "batched_behind": _batched_behind,
}
"""How a product is computed: `(W x^T)^T` by `matmul`, or by `bmm` as a batch of one: `x W^T`, or
`(W x^T)^T`."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, form: str) -> Tensor:
    """A linear layer `y = x W^T + b`, computed in one of the `FORMS`.

    Args:
        x: `[..., in]`.
        weight: `[out, in]`.
        bias: `[out]`, or `None`.
        form: Key of `FORMS`.

    Returns:
        Shape `[..., out]`.

    Examples:
        >>> x, weight = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]])
        >>> torch.ops.fxmpq.linear(x, weight, torch.ones(1), "behind").tolist()
        [[12.0]]
    """
    found = FORMS[form](x, weight)
    return found if bias is None else found + bias


torch.library.define("fxmpq::linear", "(Tensor x, Tensor weight, Tensor? bias, str form) -> Tensor")
torch.library.impl("fxmpq::linear", "CompositeImplicitAutograd", linear)
