"""What each output of a layer multiplies: image rows, and how many of them a patch takes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.nn import functional

from fxmpq.graph.operators import argument

_STRIDE, _PADDING, _DILATION, _GROUPS = 3, 4, 5, 6
_VALUES_AT_ONCE = 1 << 21


@dataclass(frozen=True)
class Rows:
    """A piece of a layer's input as rows, `taps` consecutive ones of which make a patch.

    Args:
        values: What a kernel reads of each row, shape `[groups, channels * places, rows, rest]`,
            where `places` are those of one kernel row, and `rest` counts samples and positions.
        taps: Rows of the kernel. Those of the output are as many fewer as `taps` exceeds 1.
        places: See `values`.
        residual: Something of the output, shape `[groups, output channels, rows of the
            output * rest]`.
    """

    values: Tensor
    taps: int
    places: int
    residual: Tensor

    @property
    def outputs(self) -> int:
        """Rows of the output."""
        return self.values.shape[2] - self.taps + 1

    def between(self, start: int, stop: int) -> Tensor:
        """Some rows, shape `[groups, channels * places, (stop - start) * rest]`."""
        return self.values[:, :, start:stop].flatten(2)


@dataclass(frozen=True)
class Window:
    """The geometry of a convolution, one number per spatial dimension.

    Args:
        kernel: Its size.
        stride: Steps between outputs.
        padding: Zeros before and behind.
        dilation: Steps between the kernel's places.
        groups: Channel groups.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int

    @classmethod
    def of(cls, node: fx.Node, weight: Tensor) -> Window:
        """Read the call of a convolution.

        Args:
            node: A call of `aten.conv{1,2,3}d`, `default` or `padding`.
            weight: Its weight.
        """
        kernel = tuple(weight.shape[2:])
        stride = _spread(argument(node, _STRIDE), 1, kernel)
        dilation = _spread(argument(node, _DILATION), 1, kernel)
        padding = argument(node, _PADDING)
        if padding == "same":
            extent = [step * (size - 1) for step, size in zip(dilation, kernel, strict=True)]
            sides = tuple((both // 2, both - both // 2) for both in extent)
        else:
            given = 0 if padding == "valid" else padding
            sides = tuple((side, side) for side in _spread(given, 0, kernel))
        groups = argument(node, _GROUPS)
        return cls(kernel, stride, sides, dilation, groups if isinstance(groups, int) else 1)

    @property
    def taps(self) -> int:
        """Rows of a patch that are rows of the input one below the other; 1 if they are apart."""
        return self.kernel[0] if self.stride[0] == self.dilation[0] == 1 else 1

    def rows(self, x: Tensor, residual: Tensor) -> Rows:
        """Unfold an input.

        Args:
            x: Shape `[samples, channels, *spatial]`.
            residual: Something of the output, shape `[samples, output channels, *spatial]`.
        """
        flat = [side for pair in reversed(self.padding) for side in pair]
        windows = functional.pad(x, flat)
        rank = len(self.kernel)
        first = 0 if self.taps == 1 else 1
        for axis in range(first, rank):
            extent = self.dilation[axis] * (self.kernel[axis] - 1) + 1
            windows = windows.unfold(axis + 2, extent, self.stride[axis])
            windows = windows[..., :: self.dilation[axis]]
        # From [samples, channels, *positions, *places] to [channels, *places, rows, samples, ...].
        places = range(2 + rank, windows.dim())
        windows = windows.permute(1, *places, 2, 0, *range(3, 2 + rank))
        outputs = residual.permute(1, 2, 0, *range(3, 2 + rank))
        outputs = outputs.reshape(self.groups, residual.shape[1] // self.groups, -1)
        size = math.prod(self.kernel[first:])
        values = x.shape[1] // self.groups * size
        rows = 1 if first == 0 else windows.shape[1 + len(places)]
        return Rows(windows.reshape(self.groups, values, rows, -1), self.taps, size, outputs)


def conv_rows(window: Window, x: Tensor, residual: Tensor) -> Iterator[Rows]:
    """Unfold the input of a convolution, so few samples at a time that memory stays bounded.

    Args:
        window: Its geometry.
        x: Shape `[samples, channels, *spatial]`, or one sample without the first dimension.
        residual: Something of the output, with the same samples.
    """
    if x.dim() < len(window.kernel) + 2:
        x, residual = x.unsqueeze(0), residual.unsqueeze(0)
    repeats = math.prod(window.kernel) // window.taps
    each = x[0].numel() * repeats
    size = max(1, _VALUES_AT_ONCE // each)
    for some, theirs in zip(torch.split(x, size), torch.split(residual, size), strict=True):
        yield window.rows(some, theirs)


def linear_rows(x: Tensor, residual: Tensor) -> Iterator[Rows]:
    """The input of a linear layer in the same form: one row, all positions alike.

    Args:
        x: Shape `[..., inputs]`.
        residual: Shape `[..., outputs]`.
    """
    x, residual = x.reshape(-1, x.shape[-1]), residual.reshape(-1, residual.shape[-1])
    size = max(1, _VALUES_AT_ONCE // x.shape[1])
    for some, theirs in zip(torch.split(x, size), torch.split(residual, size), strict=True):
        yield Rows(some.T[None, :, None], 1, 1, theirs.T[None])


def _spread(given: object, default: int, kernel: Sequence[int]) -> tuple[int, ...]:
    """One number per spatial dimension, as the operators take one for all."""
    values = [default] if given is None else given
    found = [values] if isinstance(values, int) else list(values)  # type: ignore[call-overload]
    return tuple(found * len(kernel) if len(found) == 1 else found)
