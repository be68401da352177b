"""A streaming histogram: activation statistics in bounded memory."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_BINS = 4096
_FIRST_BATCH_BINS = 2048
_SAMPLED = 1 << 18
_SUMMED_AT_ONCE = 1 << 16  # stays in the cache, also in double precision
_SUMMED_ELSEWHERE = 1 << 24  # a GPU waits for the sums of each part
_SMALLEST_WIDTH = float(torch.finfo(torch.float32).tiny)


class StreamingHistogram:
    """Counts values that arrive in batches, without knowing their range beforehand.

    The bins lie on a lattice: bin `i` covers `[(origin + i) * width, (origin + i + 1) * width)`.
    When a batch falls outside, the width doubles and neighbours merge, so memory stays at
    4096 counts and 0 is always an edge. Minimum, maximum, mean and variance are exact; counts
    come from at most 2^18 values a batch, spaced evenly over every dimension.

    Attributes:
        minimum: The smallest value so far.
        maximum: The largest.
        counts: How many values each bin holds, `float64`, shape `[4096]`.
        zeros: How many of the counted values are exactly 0.
        mean: Of all values, in double precision.

    Examples:
        >>> histogram = StreamingHistogram()
        >>> histogram.update(torch.tensor([0.0, 1.0]))
        >>> histogram.update(torch.tensor([-3.0, 8.0]))
        >>> histogram.minimum, histogram.maximum, float(histogram.counts.sum())
        (-3.0, 8.0, 4.0)
        >>> histogram.mean, histogram.variance
        (1.5, 16.25)
    """

    def __init__(self) -> None:
        self.minimum = float("inf")
        self.maximum = float("-inf")
        self._width = 0.0
        self._origin = 0
        self.counts = torch.zeros(_BINS, dtype=torch.float64)
        self.zeros = 0.0
        self.mean = 0.0
        self._size = 0
        self._squares = 0.0

    @property
    def width(self) -> float:
        """Width of a bin; 0 while every value is 0."""
        return self._width

    @property
    def variance(self) -> float:
        """Mean squared distance from the mean, of all values, in double precision."""
        return self._squares / self._size if self._size else 0.0

    @property
    def centres(self) -> Tensor:
        """Middle of each bin, `float64`, shape `[4096]`."""
        return (torch.arange(_BINS, dtype=torch.float64) + self._origin + 0.5) * self._width

    def update(self, values: Tensor) -> None:
        """Count the values of one batch.

        Args:
            values: Any shape, at least one value.

        Raises:
            FloatingPointError: If a value is NaN or infinite.
        """
        flat = values.detach().reshape(-1)
        low, high = (float(bound) for bound in torch.aminmax(flat))
        if not (abs(low) < float("inf") and abs(high) < float("inf")):
            raise FloatingPointError("NaN or infinite values")
        self.minimum, self.maximum = min(self.minimum, low), max(self.maximum, high)
        self._grow(min(0.0, self.minimum), max(0.0, self.maximum))
        on_cpu = flat.device.type == "cpu"
        for part in torch.split(flat, _SUMMED_AT_ONCE if on_cpu else _SUMMED_ELSEWHERE):
            self._sum(part.double())
        stride = _sampling_stride(flat.numel())
        sampled = flat[::stride]
        self.zeros += (sampled.numel() - int(sampled.count_nonzero())) * stride
        if self._width == 0.0:
            self.counts[0] += sampled.numel() * stride
            return
        # Counted in units of the width, so that edges are integers however large or small the
        # values; rounding may push a value on the outermost edges over them.
        first, last = self._origin, self._origin + _BINS
        places = (sampled.float() / self._width).clamp_(first, last)
        counts = torch.histc(places, bins=_BINS, min=first, max=last)
        self.counts += counts.cpu().double() * stride

    def _sum(self, values: Tensor) -> None:
        """Join the mean and the squared distances of some values to those so far.

        With `d` the difference of the two means, `mean += d n / N` and the squares grow by
        `d^2 n (N - n) / N` besides their own (Chan, Golub and LeVeque 1983), which loses nothing
        where the mean is much larger than the deviation.
        """
        size, mean = values.numel(), float(values.mean())
        values = values - mean
        before, self._size = self._size, self._size + size
        difference = mean - self.mean
        self.mean += difference * size / self._size
        spread = difference * difference * before / self._size * size
        self._squares += float(values.dot(values)) + spread

    def _grow(self, low: float, high: float) -> None:
        """Widen the lattice until `[low, high]` fits."""
        if low == high:
            return
        if self._width == 0.0:
            self._width = max((high - low) / _FIRST_BATCH_BINS, _SMALLEST_WIDTH)
            self._origin = int(low // self._width) - 1 if low < 0 else 0
            # Zeros seen so far move to the bin that begins at 0.
            self.counts = self.counts.roll(-self._origin)
        while not self._covers(low, high):
            self._double(low)

    def _covers(self, low: float, high: float) -> bool:
        return low >= self._origin * self._width and high < (self._origin + _BINS) * self._width

    def _double(self, low: float) -> None:
        """Merge neighbouring bins and move the origin down as far as `low` needs."""
        shift = self._origin % 2
        padded = torch.zeros(_BINS + 2, dtype=torch.float64)
        padded[shift : shift + _BINS] = self.counts
        merged = padded.reshape(-1, 2).sum(dim=1)
        origin = (self._origin - shift) // 2
        self._width *= 2
        target = min(origin, int(low // self._width) - 1) if low < 0 else origin
        target = max(target, origin - (_BINS - merged.numel()))
        self.counts = torch.zeros(_BINS, dtype=torch.float64)
        self.counts[origin - target : origin - target + merged.numel()] = merged
        self._origin = target


def _sampling_stride(size: int) -> int:
    """Smallest stride that keeps few enough values and visits all indices of every dimension.

    A stride that shares a factor with a dimension would see only some of its channels.
    """
    stride = -(-size // _SAMPLED)
    while math.gcd(stride, size) > 1:
        stride += 1
    return stride
