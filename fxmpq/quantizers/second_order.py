"""Second-order rounding: codes that lose least of a layer's output, not of its weight."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

_COLUMNS = 128


@dataclass(frozen=True)
class Grid:
    """The values that a weight's codes stand for: `scale * code`, integer codes within limits.

    Args:
        scale: Positive, shape `[groups, channels, weights]` or one that broadcasts to it.
        low: Smallest code.
        high: Largest code.
    """

    scale: Tensor
    low: int
    high: int

    def nearest(self, weight: Tensor) -> Tensor:
        """The nearest codes, `clamp(round(weight / scale), low, high)`, in the weight's dtype."""
        return torch.round(weight / self.scale).clamp_(self.low, self.high)


@dataclass(frozen=True)
class Quadratic:
    """A layer's squared error, but for a constant, as a form in the change of its weight.

    For each output channel, `f(D) = D H D^T - 2 D R^T`. The channels of a group read the same
    inputs and share `H`; depthwise convolutions have a group per channel.

    Args:
        second: `H`, symmetric and positive semi-definite, shape `[groups, weights, weights]`.
        cross: `R`, shape `[groups, channels, weights]`.

    Examples:
        >>> form = Quadratic(torch.eye(2)[None], torch.tensor([[[1.0, 2.0]]]))
        >>> form.minimum(1e-9), form.values(form.minimum(1e-9))
        (tensor([[[1., 2.]]]), tensor([[-5.]]))
    """

    second: Tensor
    cross: Tensor

    def values(self, change: Tensor) -> Tensor:
        """`f` of each channel, shape `[groups, channels]`.

        Args:
            change: `D`, shape `[groups, channels, weights]`.
        """
        return ((change @ self.second - 2 * self.cross) * change).sum(2)

    def damped(self, damping: float) -> Tensor:
        """`H` with a multiple of its mean diagonal added to the diagonal, so that it inverts.

        Args:
            damping: The multiple; a group whose inputs never vary gets the identity.
        """
        diagonal = self.second.diagonal(dim1=1, dim2=2)
        level = damping * diagonal.mean(1, keepdim=True)
        level = torch.where(level > 0, level, torch.ones_like(level))
        return self.second + torch.diag_embed(level.expand_as(diagonal))

    def minimum(self, damping: float) -> Tensor:
        """The change that real numbers would take, `D = R (H + damping)^-1`.

        Args:
            damping: See `damped`.
        """
        factor = torch.linalg.cholesky(self.damped(damping))
        return torch.cholesky_solve(self.cross.mT, factor).mT


def feedback_codes(form: Quadratic, weight: Tensor, grid: Grid, *, damping: float) -> Tensor:
    """Round column by column, and let the columns to come make up for each rounding.

    With `U` the upper Cholesky factor of the inverse of the damped `H`, rounding column `j` by
    `e_j = (w_j - q_j) / U_jj` takes `e_j U_jk` from every later column `k`, which is the best
    that these can do as long as they are real (OBQ, Frantar et al. 2022, arXiv:2208.11580, in
    the fixed order of GPTQ, arXiv:2210.17323). The form's minimum counts: rounding begins at
    `weight + R H^-1`. Columns come by falling diagonal of `H`, so that those that matter most
    are rounded while most can still follow.

    Cost: about one multiplication of `[channels, weights]` by `[weights, weights]`.

    Args:
        form: The error to keep low.
        weight: The float weight from which changes are counted, `[groups, channels, weights]`.
        grid: Where it may go.
        damping: See `Quadratic.damped`.

    Returns:
        Codes, in the shape and dtype of `weight`.

    Examples:
        >>> form = Quadratic(torch.tensor([[[1.0, 0.9], [0.9, 1.0]]]), torch.zeros(1, 1, 2))
        >>> weight = torch.tensor([[[0.4, 0.4]]])
        >>> feedback_codes(form, weight, Grid(torch.ones(1, 1, 1), -2, 1), damping=1e-6)
        tensor([[[0., 1.]]])
    """
    damped = form.damped(damping)
    order = damped.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True, stable=True)
    columns = order.unsqueeze(1).expand_as(weight)
    damped = damped.gather(1, order.unsqueeze(2).expand_as(damped))
    damped = damped.gather(2, order.unsqueeze(1).expand_as(damped))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor = torch.linalg.cholesky(inverse, upper=True)
    left = (weight + form.minimum(damping)).gather(2, columns)
    scale = grid.scale.expand_as(weight).gather(2, columns)
    codes = torch.empty_like(left)
    size = weight.shape[2]
    for start in range(0, size, _COLUMNS):
        stop = min(start + _COLUMNS, size)
        errors = torch.empty_like(left[:, :, start:stop])
        for at in range(start, stop):
            wanted, step = left[:, :, at], scale[:, :, at]
            code = torch.round(wanted / step).clamp_(grid.low, grid.high)
            error = (wanted - code * step) / factor[:, at, at].unsqueeze(1)
            taken = error.unsqueeze(2) * factor[:, at, at + 1 : stop].unsqueeze(1)
            left[:, :, at + 1 : stop] -= taken
            codes[:, :, at], errors[:, :, at - start] = code, error
        left[:, :, stop:] -= errors @ factor[:, start:stop, stop:]
    return torch.empty_like(codes).scatter_(2, columns, codes)


def descend_codes(
    form: Quadratic, weight: Tensor, codes: Tensor, grid: Grid, *, sweeps: int
) -> Tensor:
    """Lower the error one code at a time: coordinate descent on the integers.

    Each code in turn goes where `f` is least with all others fixed, which is the legal integer
    nearest to `q_j - f'_j / (2 scale_j H_jj)`. So `f` never grows (but for rounding of the
    arithmetic), and what is left when no code moves any more cannot be improved by moving one.

    Cost: a sweep is about two multiplications of `[channels, weights]` by `[weights, weights]`.

    Args:
        form: The error to lower.
        weight: The float weight from which changes are counted, `[groups, channels, weights]`.
        codes: Where to begin, in the weight's shape and dtype; not changed.
        grid: Where codes may go.
        sweeps: How often to go through all columns at most; it ends when none moves.

    Returns:
        Codes, like `codes`.

    Examples:
        >>> form = Quadratic(torch.tensor([[[1.0, 0.9], [0.9, 1.0]]]), torch.zeros(1, 1, 2))
        >>> grid, weight = Grid(torch.ones(1, 1, 1), -2, 1), torch.tensor([[[0.4, 0.4]]])
        >>> descend_codes(form, weight, torch.zeros(1, 1, 2), grid, sweeps=9).int()
        tensor([[[1, 0]]], dtype=torch.int32)
    """
    scale, codes = grid.scale.expand_as(weight), codes.clone()
    diagonal = form.second.diagonal(dim1=1, dim2=2).unsqueeze(1)
    # Where nothing varies, nothing is gained by moving.
    rate = 1 / (torch.where(diagonal > 0, diagonal, torch.inf) * scale)
    slope = (codes * scale - weight) @ form.second - form.cross
    for _ in range(sweeps):
        before = codes.clone()
        for start in range(0, weight.shape[2], _COLUMNS):
            stop = min(start + _COLUMNS, weight.shape[2])
            near = form.second[:, start:stop, start:stop]
            here = slope[:, :, start:stop]
            for at in range(start, stop):
                code = codes[:, :, at]
                best = torch.addcmul(code, here[:, :, at - start], rate[:, :, at], value=-1)
                best.round_().clamp_(grid.low, grid.high)
                move = (best - code).mul_(scale[:, :, at])
                code.copy_(best)
                here.baddbmm_(move.unsqueeze(2), near[:, at - start].unsqueeze(1))
            moves = (codes - before)[:, :, start:stop] * scale[:, :, start:stop]
            slope[:, :, :start] += moves @ form.second[:, start:stop, :start]
            slope[:, :, stop:] += moves @ form.second[:, start:stop, stop:]
        if torch.equal(codes, before):
            break
    return codes


def fitted_scale(form: Quadratic, weight: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """For each channel the one scale with which its codes lose least.

    `f(s q - w)` is a parabola in `s` with its minimum at `q (H w + R) / (q H q)`. A channel whose
    best scale is not positive, or whose codes change nothing, keeps the scale it has.

    Args:
        form: The error to lower.
        weight: The float weight from which changes are counted, `[groups, channels, weights]`.
        codes: In the weight's shape and dtype.
        scale: The present scales, `[groups, channels, 1]`.

    Returns:
        Scales like `scale`.

    Examples:
        >>> form = Quadratic(torch.eye(2)[None], torch.zeros(1, 1, 2))
        >>> weight, codes = torch.tensor([[[0.5, 1.5]]]), torch.tensor([[[0.0, 1.0]]])
        >>> fitted_scale(form, weight, codes, torch.ones(1, 1, 1))
        tensor([[[1.5000]]])
    """
    wanted = ((weight @ form.second + form.cross) * codes).sum(2, keepdim=True)
    power = ((codes @ form.second) * codes).sum(2, keepdim=True)
    best = wanted / power
    return torch.where((power > 0) & torch.isfinite(best) & (best > 0), best, scale)


def best_codes(
    form: Quadratic, weight: Tensor, codes: Tensor, others: Iterable[Tensor], grid: Grid
) -> Tensor:
    """For each channel the codes with the least error, the earlier of equals.

    Args:
        form: The error.
        weight: The float weight from which changes are counted, `[groups, channels, weights]`.
        codes: A first choice, in the weight's shape and dtype.
        others: More of them; one at a time is held.
        grid: What they stand for.

    Returns:
        Codes in the weight's shape.

    Examples:
        >>> form = Quadratic(torch.eye(1)[None], torch.zeros(1, 2, 1))
        >>> weight, grid = torch.tensor([[[0.4], [0.6]]]), Grid(torch.ones(1, 1, 1), -2, 1)
        >>> best_codes(form, weight, torch.zeros(1, 2, 1), [torch.ones(1, 2, 1)], grid)
        tensor([[[0.],
                 [1.]]])
    """
    least = form.values(codes * grid.scale - weight)
    for other in others:
        value = form.values(other * grid.scale - weight)
        better = value < least
        codes = torch.where(better.unsqueeze(2), other, codes)
        least = torch.where(better, value, least)
    return codes
