"""Quantizers that train from where calibration ended, and compute exactly what they will be."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fxmpq.formats import NumberFormat, Scheme
from fxmpq.quantizers.codes import dequantize, nearest_codes
from fxmpq.quantizers.integer import fake_quantize_activation
from fxmpq.quantizers.modules import ActivationQuantizer, WeightQuantizer
from fxmpq.quantizers.scales import spread_scale

Rounding = Callable[[Tensor, Tensor], Tensor]
"""`rounding(x, step)`: what the quantizer of a planned graph makes of `x` with this step."""

_SMALLEST_RATIO, _LARGEST_RATIO = 1e-3, 1e3


def learned_gradients(
    x: Tensor, step: Tensor, rounding: Rounding, low: int, high: int, sharing: int
) -> Tensor:
    """Quantize by a given arithmetic, with the gradients of LSQ.

    Forward it is `rounding(x, step)` to the last bit. With `u = x / step` and `q` the result, the
    gradients are, as of LSQ (Esser et al. 2020, arXiv:1902.08153),

        dq/dx = 1 if low <= u <= high, else 0
        dq/dstep = q / step - u if low <= u <= high, else q / step

    that of a step scaled by `1 / sqrt(P * sharing)`, with `P = max(high, -low - 1)`.

    Args:
        x: Any shape.
        step: Positive, in a shape that broadcasts against `x`.
        rounding: Makes the values.
        low: Smallest multiple of the step.
        high: Largest multiple of the step.
        sharing: How many values have one step.

    Returns:
        A tensor like `x`.

    Examples:
        >>> def rounding(x, step):
        ...     return (x / step).round().clamp(0, 3) * step
        >>> step = torch.tensor(0.5, requires_grad=True)
        >>> learned_gradients(torch.tensor([0.6, 9.0]), step, rounding, 0, 3, 2).sum().backward()
        >>> abs(float(step.grad) - ((1 - 1.2) + 3) / (3 * 2) ** 0.5) < 1e-5
        True
    """
    scale = 1 / math.sqrt(max(sharing, 1) * max(high, -low - 1))
    found: Tensor = _LearnedGradients.apply(  # type: ignore[no-untyped-call]  # torch's
        x, step, rounding, (low, high), scale
    )
    return found


def straight_through(x: Tensor, rounding: Callable[[Tensor], Tensor]) -> Tensor:
    """Give `rounding(x)` and pass its gradient on to `x` as it is.

    Args:
        x: Any shape.
        rounding: Makes a tensor like `x`.

    Examples:
        >>> x = torch.tensor([0.6], requires_grad=True)
        >>> straight_through(x, torch.round).backward()
        >>> x.grad
        tensor([1.])
    """
    found: Tensor = _StraightThrough.apply(x, rounding)  # type: ignore[no-untyped-call]  # torch's
    return found


class _LearnedGradients(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401  (torch makes a class of its own for each function)
        x: Tensor,
        step: Tensor,
        rounding: Rounding,
        levels: tuple[int, int],
        scale: float,
    ) -> Tensor:
        quantized = rounding(x, step)
        ctx.save_for_backward(x, step, quantized)
        ctx.levels, ctx.scale = levels, scale
        return quantized

    @staticmethod
    def backward(
        ctx: Any,  # noqa: ANN401  (see above)
        gradient: Tensor,
    ) -> tuple[Tensor | None, ...]:
        x, step, quantized = ctx.saved_tensors
        low, high = ctx.levels
        scaled = x / step
        passes = (scaled >= low) & (scaled <= high)
        slope = (quantized / step).sub_(scaled.mul_(passes)).mul_(gradient)
        found = slope.sum_to_size(step.shape) * ctx.scale
        return gradient * passes, found, None, None, None


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401, ARG004  (see above)
        x: Tensor,
        rounding: Callable[[Tensor], Tensor],
    ) -> Tensor:
        return rounding(x)

    @staticmethod
    def backward(
        ctx: Any,  # noqa: ANN401, ARG004  (see above)
        gradient: Tensor,
    ) -> tuple[Tensor, None]:
        return gradient, None


class PlannedQuantizer(nn.Module):
    """Quantizes one tensor to the one integer format that a plan gives it, with learned steps.

    The steps are `initial * ratio`: `initial`, a buffer, is what calibration or refinement
    found, and `ratio`, the parameter, begins at 1. It gets the steps' gradient divided by
    `initial`: gradient descent then moves the steps as LSQ does, and Adam, which looks at no
    gradient's size, moves each by a share of itself. A gradient is scaled by the values that
    share a step, those of one sample for an activation. The zero point of an activation stays
    where it is.

    Args:
        name: The tensor's name for people.
        number_format: What it is quantized to.
        initial: Positive steps, as a weight's scales: `[1]`, `[channels]`, `[channels, blocks]`;
            of an activation `[1]`.
        axis: The tensor's channel dimension.
        zero_point: The code of 0.0; 0 for weights, and any for affine formats.

    Examples:
        >>> initial = torch.tensor([0.1, 1.0])
        >>> quantizer = PlannedQuantizer("weight", NumberFormat(4), initial)
        >>> quantizer(torch.tensor([[0.26], [2.6]])).tolist() == [[float(3 * initial[0])], [3.0]]
        True
    """

    initial: Tensor

    def __init__(
        self,
        name: str,
        number_format: NumberFormat,
        initial: Tensor,
        axis: int = 0,
        zero_point: int = 0,
    ) -> None:
        super().__init__()
        self.name = name
        self.number_format = number_format
        self.axis = axis
        self.zero_point = zero_point
        self.register_buffer("initial", initial.detach().clone())
        self.ratio = nn.Parameter(torch.ones_like(self.initial))

    @property
    def step(self) -> Tensor:
        """The steps as they are now, in the shape of `initial`."""
        return (self.initial * self.ratio).detach()

    def clamp_steps(self) -> None:
        """Keep every step within a thousandth and a thousand times its initial value."""
        with torch.no_grad():
            self.ratio.clamp_(_SMALLEST_RATIO, _LARGEST_RATIO)

    def forward(self, x: Tensor) -> Tensor:
        """Pass `x` (any shape) through, quantized."""
        low = self.number_format.qmin - self.zero_point
        high = self.number_format.qmax - self.zero_point
        # Adds exactly zero, and carries the gradient that the class describes.
        step = self.step + (self.ratio - self.ratio.detach()) / self.initial
        sharing = x.numel() // max(step.numel(), 1)
        if self.number_format.scheme is Scheme.AFFINE:
            # Of one sample, so that the gradient of a mean over samples is that of its parts.
            sharing //= max(x.shape[0], 1) if x.dim() else 1
        step = spread_scale(step, x.shape, self.axis, self.number_format.granularity)
        return learned_gradients(x, step, self._round, low, high, sharing)

    def _round(self, x: Tensor, step: Tensor) -> Tensor:
        if self.number_format.scheme is Scheme.AFFINE:
            scale = float(step)
            return fake_quantize_activation(x, scale, self.zero_point, self.number_format)
        return dequantize(nearest_codes(x, step, self.number_format), step, self.number_format)

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"{self.name}, {self.number_format.name}"


class PassingQuantizer(nn.Module):
    """Quantizes one tensor to a format without a step to learn; its scales stay.

    The steps of a float format grow with the value; a dynamic format finds its step at every run.

    Args:
        source: An active quantizer of a planned graph.

    Examples:
        >>> from fxmpq.formats import Precision
        >>> source = WeightQuantizer("weight", [Precision.parse("we2m1").weight], axis=0)
        >>> source.set_scale(source.formats[0], torch.ones(1))
        >>> source.activate(source.formats[0])
        >>> PassingQuantizer(source)(torch.tensor([[2.6]], requires_grad=True))
        tensor([[3.]], grad_fn=<_StraightThroughBackward>)
    """

    def __init__(self, source: ActivationQuantizer | WeightQuantizer) -> None:
        super().__init__()
        self.source = source

    def forward(self, x: Tensor) -> Tensor:
        """Pass `x` (any shape) through, quantized."""
        return straight_through(x, self.source)


def planned_quantizer(
    source: ActivationQuantizer | WeightQuantizer, device: torch.device
) -> PlannedQuantizer | PassingQuantizer:
    """A quantizer that begins with the scales or the range of an active one.

    Args:
        source: Its codes, if it has stored any, are not read: codes do not train.
        device: Where the steps belong.
    """
    found = source.active
    assert found is not None
    if not found.has_fixed_grid:
        return PassingQuantizer(source)
    if isinstance(source, WeightQuantizer):
        return PlannedQuantizer(source.name, found, source.scale(found).to(device), source.axis)
    range_ = source.ranges[found.name]
    initial = torch.tensor([range_.scale], dtype=torch.float32, device=device)
    return PlannedQuantizer(source.name, found, initial, zero_point=range_.zero_point)
