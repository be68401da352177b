"""Linear layers with several weights in one: operators whose weight is a stored matrix.

A mixture of experts multiplies each row by the weight of the expert that it was sent to, and a
batched product each batch by its own. Both are PyTorch operators here, `torch.ops.fxmpq.*`, that
take all their weights as one matrix `[experts * out, in]`, an output channel a row, as every other
layer has its weight. They can be differentiated any number of times, and exported.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("fxmpq::grouped_linear", mutates_args=())
def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor, is_turned: bool) -> Tensor:
    """Multiply consecutive rows by the weights of one expert after the other.

    `y_r = W_e x_r` for the rows `ends[e - 1] <= r < ends[e]`; rows behind the last end are 0.

    Args:
        x: Rows sorted by expert, `[rows, in]`.
        weight: `[experts * out, in]`.
        ends: Behind each expert's last row, integers `[experts]`.
        is_turned: Whether each expert's matrix is brought into the layout `[in, out]` first, for
            the bits of a model that stores it so.

    Returns:
        Shape `[rows, out]`.

    Examples:
        >>> x, weight = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[1.0], [10.0]])
        >>> grouped_linear(x, weight, torch.tensor([2, 3]), False).flatten().tolist()
        [1.0, 2.0, 30.0]
    """
    matrices = expert_matrices(weight, ends.numel()).to(x.dtype)
    found = x.new_zeros(x.shape[0], matrices.shape[1])
    for matrix, start, end in _spans(matrices, ends):
        factor = matrix.T.contiguous() if is_turned else matrix.T
        torch.mm(x[start:end], factor, out=found[start:end])
    return found


@grouped_linear.register_fake
def _(x: Tensor, weight: Tensor, ends: Tensor, is_turned: bool) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0] // ends.shape[0])


@torch.library.custom_op("fxmpq::grouped_outer", mutates_args=())
def grouped_outer(gradient: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """The weight gradient of `grouped_linear`: `sum_r g_r x_r^T` over the rows of each expert.

    Args:
        gradient: At the output, `[rows, out]`.
        x: `[rows, in]`.
        ends: Behind each expert's last row, integers `[experts]`.

    Returns:
        Shape `[experts * out, in]`.
    """
    found = x.new_zeros(ends.numel(), gradient.shape[1], x.shape[1])
    for matrix, start, end in _spans(found, ends):
        torch.mm(gradient[start:end].T, x[start:end], out=matrix)
    return found.flatten(0, 1)


@grouped_outer.register_fake
def _(gradient: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(ends.shape[0] * gradient.shape[1], x.shape[1])


def expert_matrices(weight: Tensor, experts: int) -> Tensor:
    """See a stored weight `[experts * out, in]` as `[experts, out, in]`."""
    return weight.reshape(experts, -1, weight.shape[1])


def _spans(matrices: Tensor, ends: Tensor) -> list[tuple[Tensor, int, int]]:
    """Each expert's matrix with its first row and the one behind its last, where it has any."""
    stops = [int(end) for end in ends.tolist()]
    starts = [0, *stops[:-1]]
    spans = zip(matrices.unbind(), starts, stops, strict=True)
    return [(matrix, start, end) for matrix, start, end in spans if start < end]


def _turned(weight: Tensor, experts: int) -> Tensor:
    """`[experts * out, in]` as `[experts * in, out]`: what the backward pass multiplies by."""
    return expert_matrices(weight, experts).transpose(1, 2).flatten(0, 1)


def _keep_linear(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, bool], output: Tensor) -> None:  # noqa: ANN401
    x, weight, ends, _ = inputs
    ctx.save_for_backward(x, weight, ends)


def _linear_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:  # noqa: ANN401
    x, weight, ends = ctx.saved_tensors
    backward = torch.ops.fxmpq.grouped_linear(gradient, _turned(weight, ends.numel()), ends, False)
    return backward, torch.ops.fxmpq.grouped_outer(gradient, x, ends), None, None


def _keep_outer(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:  # noqa: ANN401
    ctx.save_for_backward(*inputs)


def _outer_backward(ctx: Any, change: Tensor) -> tuple[Tensor, Tensor, None]:  # noqa: ANN401
    gradient, x, ends = ctx.saved_tensors
    linear = torch.ops.fxmpq.grouped_linear
    of_x = linear(gradient, _turned(change, ends.numel()), ends, False)
    return linear(x, change, ends, False), of_x, None


grouped_linear.register_autograd(_linear_backward, setup_context=_keep_linear)
grouped_outer.register_autograd(_outer_backward, setup_context=_keep_outer)


def batched_linear(
    x: Tensor, weight: Tensor, summand: Tensor | None, batches: int, form: str
) -> Tensor:
    """Multiply each batch by a weight of its own: `y_b = x_b W_b^T`, plus a summand.

    Args:
        x: `[batches, rows, in]`, or what broadcasts against it; with a summand just that.
        weight: `[batches * out, in]`.
        summand: `[batches, rows, out]`, or what broadcasts to it; `None` for none.
        batches: How many matrices the weight holds.
        form: How the model writes it, for its bits: `plain`, as `x @ W.mT`; `turned`, as `x @ W`
            with stored `[batches, in, out]`; or `behind`, as `W @ x.mT`, without a summand.

    Returns:
        Shape `[batches, rows, out]`.

    Examples:
        >>> x, weight = torch.ones(2, 1, 1), torch.tensor([[1.0], [10.0]])
        >>> torch.ops.fxmpq.batched_linear(x, weight, None, 2, "plain").flatten().tolist()
        [1.0, 10.0]
    """
    matrices = expert_matrices(weight, batches)
    if form == "behind":
        return torch.matmul(matrices, x.mT).mT
    factor = matrices.mT.contiguous() if form == "turned" else matrices.mT
    return torch.matmul(x, factor) if summand is None else torch.baddbmm(summand, x, factor)


torch.library.define(
    "fxmpq::batched_linear",
    "(Tensor x, Tensor weight, Tensor? summand, int batches, str form) -> Tensor",
)
torch.library.impl("fxmpq::batched_linear", "CompositeImplicitAutograd", batched_linear)
