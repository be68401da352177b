"""Rounding that gradients can move: soft codes between two integers, and straight-through steps."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from fxmpq.formats import NumberFormat

_UPPER, _LOWER = 1.1, -0.1
_SIDE = 0.45


def rectified_sigmoid(v: Tensor) -> Tensor:
    """How far up a weight is rounded: `h(v) = clamp(1.2 * sigmoid(v) - 0.1, 0, 1)`.

    The stretch lets `h` reach 0 and 1 at finite `v`, where its gradient ends (AdaRound, Nagel et
    al. 2020, arXiv:2004.10568).

    Args:
        v: Any shape.

    Returns:
        Values in `[0, 1]`, like `v`; `h(0) = 1/2` and `h(-v) = 1 - h(v)`.

    Examples:
        >>> rectified_sigmoid(torch.tensor([-9.0, 0.0, 9.0]))
        tensor([0.0000, 0.5000, 1.0000])
    """
    return (torch.sigmoid(v) * (_UPPER - _LOWER) + _LOWER).clamp(0, 1)


def inverse_rectified_sigmoid(h: Tensor) -> Tensor:
    """The `v` with `rectified_sigmoid(v) = h`; finite for every `h` in `[0, 1]`.

    Args:
        h: Any shape, in `[0, 1]`.

    Examples:
        >>> rectified_sigmoid(inverse_rectified_sigmoid(torch.tensor([0.0, 0.3, 1.0])))
        tensor([0.0000, 0.3000, 1.0000])
    """
    return torch.logit((h - _LOWER) / (_UPPER - _LOWER))


def rounding_penalty(h: Tensor, beta: float) -> Tensor:
    """Distance of soft roundings from 0 and 1: `sum 1 - |2 h - 1|^beta`.

    A large `beta` leaves all but the ends alone; as it falls, values are driven to their nearer
    end (AdaRound, arXiv:2004.10568).

    Args:
        h: From `rectified_sigmoid`, any shape.
        beta: At least 1.

    Returns:
        A scalar: 0 if every value is 0 or 1, and their number if every one is 1/2.

    Examples:
        >>> rounding_penalty(torch.tensor([0.0, 0.5, 1.0]), 2.0)
        tensor(1.)
    """
    return (1 - (2 * h - 1).abs().pow(beta)).sum()


def rounding_start(
    weight: Tensor, scale: Tensor, codes: Tensor, number_format: NumberFormat
) -> tuple[Tensor, Tensor]:
    """The two codes between which each weight is rounded, and where soft rounding starts.

    Of the two pairs that hold the present code, a weight gets the one on its own side, so that
    `lower <= weight / scale <= lower + 1` wherever the code is one of the weight's two
    neighbours. Soft rounding starts at the weight itself if that hardens to its present code,
    else as near as does.

    Args:
        weight: Any shape.
        scale: Broadcasts against `weight`.
        codes: Present integer codes, in the shape of `weight`.
        number_format: An integer format; both codes of every pair are legal in it.

    Returns:
        `(lower, v)`, both in the shape and dtype of `weight`: `lower + (v >= 0)` are `codes`.

    Examples:
        >>> weight, codes = torch.tensor([0.3, 1.8]), torch.tensor([0, 1])
        >>> lower, v = rounding_start(weight, torch.tensor(1.0), codes, NumberFormat(4))
        >>> lower, rectified_sigmoid(v)
        (tensor([0., 1.]), tensor([0.3000, 0.4500]))
    """
    exact, start = weight / scale, codes.to(weight.dtype)
    lower = torch.where(exact >= start, start, start - 1)
    lower = lower.clamp(number_format.qmin, number_format.qmax - 1)
    is_up = start > lower
    fraction = (exact - lower).clamp(0, 1)
    near = torch.where(is_up, fraction.clamp(min=1 - _SIDE), fraction.clamp(max=_SIDE))
    kept = torch.where((fraction > 0.5) == is_up, fraction, near)
    return lower, inverse_rectified_sigmoid(kept)


def hard_codes(lower: Tensor, v: Tensor) -> Tensor:
    """Codes in the end: `lower + 1` where `rectified_sigmoid(v)` is at least 1/2, else `lower`."""
    return lower + (v >= 0).to(lower.dtype)


def straight_through_round(x: Tensor) -> Tensor:
    """Round half to even, with gradient 1 everywhere.

    Examples:
        >>> x = torch.tensor([0.4, 1.6], requires_grad=True)
        >>> straight_through_round(x).sum().backward()
        >>> x.grad
        tensor([1., 1.])
    """
    return x + (x.round() - x).detach()


def affine_round(x: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int) -> Tensor:
    """Fake-quantize a tensor to a grid whose scale and zero point are learned.

    `Q(x) = s * (clip(round(x / s) + round(z), low, high) - round(z))`, roundings straight
    through. Where nothing is clipped the gradients are `dQ/dx = 1`, `dQ/ds = round(x / s) - x / s`
    and `dQ/dz = 0`; beyond the ends they are `dQ/dx = 0`, `dQ/ds = end - round(z)` and
    `dQ/dz = -s`, which moves the range towards what it cuts off (LSQ, Esser et al. 2020,
    arXiv:1902.08153; AdaQuant, Hubara et al. 2020, arXiv:2006.10518).

    Args:
        x: Any shape.
        scale: A positive scalar, shape `[]`.
        zero_point: Code of 0.0, shape `[]`, rounded to an integer in `[low, high]`.
        low: Smallest code.
        high: Largest code.

    Returns:
        A tensor like `x`.

    Examples:
        >>> zero_point = torch.tensor(1.2, requires_grad=True)
        >>> x = torch.tensor([-1.0, 0.6, 9.0])
        >>> found = affine_round(x, torch.tensor(0.5), zero_point, 0, 3)
        >>> found.detach(), torch.autograd.grad(found.sum(), zero_point)
        (tensor([-0.5000,  0.5000,  1.0000]), (tensor(-1.),))
    """
    found = _AffineRound.apply(x, scale, zero_point, low, high)  # type: ignore[no-untyped-call]
    assert isinstance(found, Tensor)
    return found


class _AffineRound(torch.autograd.Function):
    """Four passes over memory forward and a few sums backward; autograd would keep ten tensors."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int
    ) -> Tensor:
        """Quantize as the activation quantizers do."""
        step, centre = float(scale), min(max(round(float(zero_point)), low), high)
        found = (x * (1 / step)).round_().clamp_(low - centre, high - centre).mul_(step)
        least, most = (step * (end - centre) for end in (low - 0.5, high + 0.5))
        ctx.save_for_backward(x, found, scale, zero_point, (x >= least) & (x <= most))
        return found

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients to `x`, `scale` and `zero_point`; the ends take none."""
        (gradient,) = gradients
        x, found, scale, zero_point, is_inside = ctx.saved_tensors  # type: ignore[attr-defined]
        passed = gradient * is_inside
        to_scale = (torch.sum(gradient * found) - torch.sum(passed * x)) / scale
        to_centre = (passed.sum() - gradient.sum()) * scale
        return passed, to_scale.to(scale.dtype), to_centre.to(zero_point.dtype), None, None
