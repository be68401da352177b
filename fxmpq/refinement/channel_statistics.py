"""First and second moments of a layer's output per channel, in float and quantized."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fxmpq.refinement.scalable_pairs import channel_dimension
from fxmpq.refinement.views import LayerView


@dataclass(frozen=True)
class ChannelStatistics:
    """How a layer's quantized output `q` stands to its float output `y`, channel by channel.

    With `d = q - y`, over all `count` values of a channel (samples and positions), in `float64`:

    Args:
        count: Values per channel.
        mean: `E[y]`, shape `[channels]`.
        variance: `E[y^2] - E[y]^2`, shape `[channels]`.
        error_mean: `E[d]`, shape `[channels]`.
        error_variance: `E[d^2] - E[d]^2`, shape `[channels]`.
        error_covariance: `E[y d] - E[y] E[d]`, shape `[channels]`.
    """

    count: int
    mean: Tensor
    variance: Tensor
    error_mean: Tensor
    error_variance: Tensor
    error_covariance: Tensor

    @property
    def quantized_mean(self) -> Tensor:
        """`E[q]`, shape `[channels]`."""
        return self.mean + self.error_mean

    @property
    def quantized_variance(self) -> Tensor:
        """`var(q) = var(y) + var(d) + 2 cov(y, d)`, shape `[channels]`."""
        found = self.variance + self.error_variance + 2 * self.error_covariance
        return found.clamp(min=0.0)

    @property
    def error(self) -> float:
        """Relative squared error of the output, `sum d^2 / sum y^2`; infinite if all `y` are 0."""
        return self._relative(self.error_variance + self.error_mean.square())

    def error_after(self, factors: Tensor) -> float:
        """The error once `q` is scaled per channel and its mean is made the float one.

        With `f` the factor, `f q - y = (f - 1) y + f d`, whose variance is
        `(f - 1)^2 var(y) + f^2 var(d) + 2 f (f - 1) cov(y, d)`.

        Args:
            factors: Shape `[channels]`; ones where only the mean is corrected.
        """
        rest = factors - 1
        own = rest.square() * self.variance + factors.square() * self.error_variance
        return self._relative((own + 2 * factors * rest * self.error_covariance).clamp(min=0.0))

    def _relative(self, noise: Tensor) -> float:
        signal = float((self.variance + self.mean.square()).sum())
        power = float(noise.sum())
        if power == 0:
            return 0.0
        return power / signal if signal > 0 else math.inf


def channel_statistics(view: LayerView) -> ChannelStatistics:
    """Measure a layer that a walk has come to, as it is quantized now.

    Runs the layer twice on every batch, in float on its float input and quantized on its
    quantized input.

    Args:
        view: Of a convolution or a linear layer.

    Returns:
        The moments of its output.
    """
    sums: list[Tensor] = []
    count = 0
    with torch.no_grad():
        for batch in range(len(view)):
            expected = view.float_output(batch)
            error = view.quantized_output(batch) - expected
            channel_axis = channel_dimension(view.layer, expected.dim())
            others = [axis for axis in range(expected.dim()) if axis != channel_axis]
            products = (
                expected,
                expected.square(),
                error,
                error.square(),
                expected * error,
            )
            found = [_channel_sum(product, others) for product in products]
            sums = [old + new for old, new in zip(sums, found, strict=True)] if sums else found
            count += expected.numel() // expected.shape[channel_axis]
    mean, square, error_mean, error_square, product_mean = (total / count for total in sums)
    return ChannelStatistics(
        count=count,
        mean=mean,
        variance=(square - mean.square()).clamp(min=0.0),
        error_mean=error_mean,
        error_variance=(error_square - error_mean.square()).clamp(min=0.0),
        error_covariance=product_mean - mean * error_mean,
    )


def _channel_sum(values: Tensor, others: list[int]) -> Tensor:
    """Sum over all dimensions but the channels', which a sample of a linear layer has alone."""
    return values.sum(others, dtype=torch.float64) if others else values.double()
