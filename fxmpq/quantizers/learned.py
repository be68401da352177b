"""Learned step sizes (LSQ): quantizers that train, one step per candidate width."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fxmpq.errors import PrecisionError
from fxmpq.formats import NumberFormat

_SMALLEST_STEP = 1e-5


def learned_round(x: Tensor, step: Tensor, low: int, high: int) -> Tensor:
    """Round to multiples of a learned step: `Q(x) = s * round(clip(x / s, low, high))`.

    Rounding is half to even and passes its gradient through. With `u = x / s`, the gradients are

        dQ/dx = 1 if low <= u <= high, else 0
        dQ/ds = round(u) - u if low <= u <= high, else low or high

    and the one of `s` is scaled by `1 / sqrt(P * x.numel())`, with `P = max(high, -low - 1)`,
    the largest code of a signed format as of an unsigned one (LSQ, Esser et al. 2020,
    arXiv:1902.08153, which on the two ends themselves lets nothing through to `x`).

    Args:
        x: Any shape.
        step: A positive scalar, shape `[]`.
        low: Smallest multiple, at most 0: `-zero_point` for affine codes.
        high: Largest multiple, at least 0.

    Returns:
        A tensor like `x`.

    Examples:
        >>> x, step = torch.tensor([-1.0, 0.6, 9.0]), torch.tensor(0.5, requires_grad=True)
        >>> learned_round(x, step, 0, 3)
        tensor([0.0000, 0.5000, 1.5000], grad_fn=<MulBackward0>)
    """
    scaled = step.detach() + (step - step.detach()) * _gradient_scale(x.numel(), low, high)
    clipped = (x / scaled).clamp(low, high)
    return (clipped + (clipped.round() - clipped).detach()) * scaled


def weight_step(weight: Tensor, number_format: NumberFormat) -> float:
    """Where the step of a weight starts: `max(|m - 3d|, |m + 3d|) / 2^(bits - 1)`.

    `m` is the mean of the weight and `d` its standard deviation, as LIMPQ begins
    (Tang et al. 2022, arXiv:2203.08368).

    Args:
        weight: Any shape.
        number_format: A symmetric format.

    Examples:
        >>> weight_step(torch.tensor([-1.0, 1.0]), NumberFormat(2))
        1.5
    """
    found = weight.detach().double()
    mean, deviation = float(found.mean()), float(found.std(correction=0))
    return (abs(mean) + 3 * deviation) / (1 << (number_format.bits - 1))


def activation_step(mean_magnitude: float, low: int, high: int) -> float:
    """Where the step of an activation starts: `2 E|x| / sqrt(P)`, as LSQ begins.

    Args:
        mean_magnitude: `E|x|` of the tensor.
        low: Smallest multiple of the step.
        high: Largest multiple; `P = max(high, -low - 1)`.

    Examples:
        >>> activation_step(0.5, 0, 4)
        0.5
    """
    return 2 * mean_magnitude / math.sqrt(max(high, -low - 1))


class LearnedQuantizer(nn.Module):
    """Quantizes one tensor with a learned step per candidate format, one active or none.

    There is one step for the whole tensor, so a step says how coarse the tensor has become.
    Steps are parameters named `steps.<format>`, `float32`, shape `[]`; those of formats that
    are not active get no gradient.

    Args:
        name: The tensor's name for people, used in errors.
        steps: First step of each candidate format.
        levels: Smallest and largest multiple of the step in each format: `(qmin, qmax)` of a
            symmetric format, and `(-zero_point, qmax - zero_point)` of an affine one, whose
            zero point stays where it is.
        peak: Largest magnitude of the tensor that is known of. Steps stay within
            `[1e-5 * min(1, peak), max(1, peak)]`, which for tensors of magnitude 1 is the range
            of LIMPQ: a step above the peak would leave a single code, and a fixed 1 would be
            narrower than one code of a tensor with values of hundreds.

    Examples:
        >>> int4 = NumberFormat(4)
        >>> quantizer = LearnedQuantizer("weight", {int4: 0.1}, {int4: (-8, 7)}, peak=0.8)
        >>> quantizer.activate(int4)
        >>> quantizer(torch.tensor([0.26, 3.0]))
        tensor([0.3000, 0.7000], grad_fn=<MulBackward0>)
    """

    def __init__(
        self,
        name: str,
        steps: Mapping[NumberFormat, float],
        levels: Mapping[NumberFormat, tuple[int, int]],
        peak: float,
    ) -> None:
        super().__init__()
        self.name = name
        self.formats = tuple(steps)
        self.levels = dict(levels)
        self.bounds = (_SMALLEST_STEP * min(1.0, peak or 1.0), max(1.0, peak))
        first = {
            entry.name: torch.tensor(step, dtype=torch.float32) for entry, step in steps.items()
        }
        self.steps = nn.ParameterDict({key: nn.Parameter(step) for key, step in first.items()})
        self.active: NumberFormat | None = None
        self.clamp_steps()

    def activate(self, number_format: NumberFormat | None) -> None:
        """Quantize to this format from now on; `None` switches off.

        Raises:
            PrecisionError: If it is no candidate.
        """
        if number_format is not None and number_format not in self.levels:
            raise PrecisionError(
                f"{self.name} has no step for {number_format.name}; it has "
                f"{', '.join(entry.name for entry in self.formats) or 'none'}"
            )
        self.active = number_format

    def step(self, number_format: NumberFormat) -> nn.Parameter:
        """The step of a candidate, shape `[]`."""
        found = self.steps[number_format.name]
        assert isinstance(found, nn.Parameter)
        return found

    def set_step(self, number_format: NumberFormat, step: float) -> None:
        """Begin a candidate's step anew, within the bounds, in place."""
        low, high = self.bounds
        with torch.no_grad():
            self.step(number_format).fill_(min(max(step, low), high))

    def clamp_steps(self) -> None:
        """Bring every step back within the bounds, as after each step of an optimizer."""
        with torch.no_grad():
            for number_format in self.formats:
                self.step(number_format).clamp_(*self.bounds)

    def forward(self, x: Tensor) -> Tensor:
        """Pass `x` (any shape) through, quantized if a format is active."""
        if self.active is None:
            return x
        return learned_round(x, self.step(self.active), *self.levels[self.active])

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"{self.name}, active={self.active and self.active.name}"


def _gradient_scale(numel: int, low: int, high: int) -> float:
    return 1 / math.sqrt(max(numel, 1) * max(high, -low - 1))
