"""The quantizer modules that `prepare` inserts: each holds every candidate, one active or none."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from fxmpq.formats import NumberFormat
from fxmpq.quantizers.integer import dequantize_weight, fake_quantize_activation, weight_codes
from fxmpq.quantizers.ranges import ActivationRange


class ActivationQuantizer(nn.Module):
    """Quantizes one activation tensor to one of several affine formats.

    Args:
        name: The tensor's name for people, used in errors.
        formats: Candidate formats.
    """

    def __init__(self, name: str, formats: Sequence[NumberFormat]) -> None:
        super().__init__()
        self.name = name
        self.formats = tuple(formats)
        self.ranges: dict[str, ActivationRange] = {}
        self.active: NumberFormat | None = None

    def activate(self, number_format: NumberFormat | None) -> None:
        """Quantize to this format from now on; `None` switches off."""
        self.active = number_format

    def quantize(self, x: Tensor, number_format: NumberFormat) -> Tensor:
        """Fake-quantize `x` (any shape) to a calibrated format."""
        found = self.ranges[number_format.name]
        return fake_quantize_activation(x, found.scale, found.zero_point, number_format)

    def forward(self, x: Tensor) -> Tensor:
        """Pass `x` through, quantized if a format is active."""
        return x if self.active is None else self.quantize(x, self.active)

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"{self.name}, active={self.active and self.active.name}"


class WeightQuantizer(nn.Module):
    """Quantizes one weight to one of several symmetric formats, one scale per channel.

    The scales are buffers named `scale_<format>`, `float32`, shape `[channels]`.

    Args:
        name: The weight's name.
        formats: Candidate formats.
        axis: The channel dimension.
    """

    def __init__(self, name: str, formats: Sequence[NumberFormat], axis: int) -> None:
        super().__init__()
        self.name = name
        self.formats = tuple(formats)
        self.axis = axis
        self.active: NumberFormat | None = None

    def set_scale(self, number_format: NumberFormat, scale: Tensor) -> None:
        """Store the scales, shape `[channels]`, of a candidate."""
        self.register_buffer(f"scale_{number_format.name}", scale)

    def scale(self, number_format: NumberFormat) -> Tensor:
        """Scales of a calibrated candidate, shape `[channels]`."""
        return self.get_buffer(f"scale_{number_format.name}")

    def activate(self, number_format: NumberFormat | None) -> None:
        """Quantize to this format from now on; `None` switches off."""
        self.active = number_format

    def codes(self, weight: Tensor, number_format: NumberFormat) -> Tensor:
        """Integer codes of `weight` in a calibrated format."""
        return weight_codes(weight, self.scale(number_format), number_format, self.axis)

    def quantize(self, weight: Tensor, number_format: NumberFormat) -> Tensor:
        """Fake-quantize `weight` to a calibrated format."""
        codes = self.codes(weight, number_format)
        return dequantize_weight(codes, self.scale(number_format), self.axis)

    def forward(self, weight: Tensor) -> Tensor:
        """Pass the weight through, quantized if a format is active."""
        return weight if self.active is None else self.quantize(weight, self.active)

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"{self.name}, active={self.active and self.active.name}"


class BiasCorrection(nn.Module):
    """Adds to a layer's bias what weight rounding takes from its mean output.

    With weight error `dW` and mean input `E[x]`, the shift is `-E[dW * x]` per output
    channel (empirical bias correction, Nagel et al. 2019, arXiv:1906.04721). Shifts are
    buffers named `shift_<weight format>`, shape `[channels]`.

    Args:
        name: The layer's name.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.active: NumberFormat | None = None

    def set_shift(self, number_format: NumberFormat, shift: Tensor) -> None:
        """Store the shift, shape `[channels]`, that goes with a weight format."""
        self.register_buffer(f"shift_{number_format.name}", shift)

    def shift(self, number_format: NumberFormat) -> Tensor | None:
        """The shift of a weight format, or `None` where there is none."""
        found = getattr(self, f"shift_{number_format.name}", None)
        return found if isinstance(found, Tensor) else None

    def activate(self, number_format: NumberFormat | None) -> None:
        """Correct for this weight format from now on; `None` switches off."""
        self.active = number_format

    def forward(self, bias: Tensor | None) -> Tensor | None:
        """Return the bias, shape `[channels]` or `None`, with the active shift added."""
        shift = None if self.active is None else self.shift(self.active)
        if shift is None:
            return bias
        return shift if bias is None else bias + shift

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"{self.name}, active={self.active and self.active.name}"
