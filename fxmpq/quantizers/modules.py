"""The quantizer modules that `prepare` inserts: each holds every candidate, one active or none."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from fxmpq.formats import NumberFormat
from fxmpq.quantizers.codes import code_dtype, dequantize, nearest_codes, round_in_place
from fxmpq.quantizers.dynamic import fake_quantize_dynamic
from fxmpq.quantizers.floating import fake_quantize_float
from fxmpq.quantizers.integer import fake_quantize_activation
from fxmpq.quantizers.ranges import ActivationRange
from fxmpq.quantizers.scales import spread_scale, storable_scale


class ActivationQuantizer(nn.Module):
    """Quantizes one activation tensor to one of several formats, affine or float.

    A dynamic format has no range among `ranges`: it finds one on each tensor.

    Args:
        name: The tensor's name for people, used in errors.
        formats: Candidate formats.
        is_symmetric: Whether ranges have the zero point `2^(bits - 1)`, the middle of the codes,
            as hardware wants that computes on signed codes without zero points. Of float formats
            it is 0 either way.
        is_output: Whether it stores what a layer returns, which a dynamic format, one of the
            layer's input, leaves as it is.
    """

    def __init__(
        self,
        name: str,
        formats: Sequence[NumberFormat],
        is_symmetric: bool = False,
        is_output: bool = False,
    ) -> None:
        super().__init__()
        self.name = name
        self.formats = tuple(formats)
        self.is_symmetric = is_symmetric
        self.is_output = is_output
        self.ranges: dict[str, ActivationRange] = {}
        self.active: NumberFormat | None = None

    def activate(self, number_format: NumberFormat | None) -> None:
        """Quantize to this format from now on; `None`, or what it leaves alone, switches off."""
        self.active = None if self.leaves_alone(number_format) else number_format

    def leaves_alone(self, number_format: NumberFormat | None) -> bool:
        """Whether a format changes nothing here."""
        return number_format is None or (self.is_output and number_format.dynamic is not None)

    def quantize(self, x: Tensor, number_format: NumberFormat) -> Tensor:
        """Fake-quantize `x` (any shape) to a format: a dynamic or a calibrated one."""
        if self.leaves_alone(number_format):
            return x
        if number_format.dynamic is not None:
            return fake_quantize_dynamic(x, number_format, is_symmetric=self.is_symmetric)
        found = self.ranges[number_format.name]
        if not number_format.is_integer:
            return fake_quantize_float(x, found.scale, number_format)
        return fake_quantize_activation(x, found.scale, found.zero_point, number_format)

    def forward(self, x: Tensor) -> Tensor:
        """Pass `x` through, quantized if a format is active."""
        return x if self.active is None else self.quantize(x, self.active)

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"{self.name}, active={self.active and self.active.name}"


class WeightQuantizer(nn.Module):
    """Quantizes one weight to one of several formats, symmetric or float.

    The scales are buffers named `scale_<format>`, `float32`, in the shape that `scale_shape`
    gives: `[1]` per tensor, `[channels]` per channel, `[channels, blocks]` per block. Codes are
    integers, or bit patterns of floats (`uint8`); they are found by rounding to nearest, unless
    a better rounding was stored as the buffer `codes_<format>`.

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
        """Store the scales of a candidate, rounded to what the format can store."""
        stored = storable_scale(scale, number_format)
        self.register_buffer(f"scale_{number_format.name}", stored)

    def scale(self, number_format: NumberFormat) -> Tensor:
        """Scales of a calibrated candidate: `[1]`, `[channels]` or `[channels, blocks]`."""
        return self.get_buffer(f"scale_{number_format.name}")

    def activate(self, number_format: NumberFormat | None) -> None:
        """Quantize to this format from now on; `None` switches off."""
        self.active = number_format

    def set_codes(self, number_format: NumberFormat, codes: Tensor | None) -> None:
        """Store the codes of a candidate, in the weight's shape; `None` rounds to nearest again."""
        if codes is not None:
            codes = codes.to(code_dtype(number_format))
        self.register_buffer(f"codes_{number_format.name}", codes)

    def stored_codes(self, number_format: NumberFormat) -> Tensor | None:
        """The stored codes of a candidate, or `None` where it rounds to nearest."""
        found = getattr(self, f"codes_{number_format.name}", None)
        return found if isinstance(found, Tensor) else None

    def spread_scale(self, weight: Tensor, number_format: NumberFormat) -> Tensor:
        """Scales of a calibrated candidate in a shape that broadcasts against `weight`."""
        scale = self.scale(number_format)
        return spread_scale(scale, weight.shape, self.axis, number_format.granularity)

    def codes(self, weight: Tensor, number_format: NumberFormat) -> Tensor:
        """Codes of `weight` in a calibrated format: stored ones, else the nearest."""
        stored = self.stored_codes(number_format)
        if stored is not None:
            return stored
        return nearest_codes(weight, self.spread_scale(weight, number_format), number_format)

    def quantize(self, weight: Tensor, number_format: NumberFormat) -> Tensor:
        """Fake-quantize `weight` to a calibrated format."""
        scale = self.spread_scale(weight, number_format)
        if not number_format.is_integer and self.stored_codes(number_format) is None:
            # To the last bit what the codes stand for, in a quarter of the time.
            return round_in_place(weight / scale, number_format).mul_(scale)
        return dequantize(self.codes(weight, number_format), scale, number_format)

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
    buffers named `shift_<weight format>`, shape `[channels]`. Where the target stores biases as
    integers, the buffer `rounding`, shape `[channels]`, takes the sum to the nearest of them;
    it goes with one precision of the layer, and is gone when another becomes active.

    Args:
        name: The layer's name.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.active: NumberFormat | None = None

    def set_shift(self, number_format: NumberFormat, shift: Tensor | None) -> None:
        """Store the shift, shape `[channels]`, that goes with a weight format; `None` for none."""
        self.register_buffer(f"shift_{number_format.name}", shift)

    def shift(self, number_format: NumberFormat) -> Tensor | None:
        """The shift of a weight format, or `None` where there is none."""
        found = getattr(self, f"shift_{number_format.name}", None)
        return found if isinstance(found, Tensor) else None

    def set_rounding(self, rounding: Tensor | None) -> None:
        """Store what rounds the shifted bias of the active precision; `None` for nothing."""
        self.register_buffer("rounding", rounding)

    def activate(self, number_format: NumberFormat | None) -> None:
        """Correct for this weight format from now on; `None` switches off."""
        self.active = number_format
        if self.added_rounding is not None:
            self.set_rounding(None)

    @property
    def added_rounding(self) -> Tensor | None:
        """What rounds the shifted bias, or `None` where nothing does."""
        found = getattr(self, "rounding", None)
        return found if isinstance(found, Tensor) else None

    @property
    def added(self) -> Tensor | None:
        """What is added to the bias now, shape `[channels]`; `None` for nothing."""
        shift = None if self.active is None else self.shift(self.active)
        rounding = self.added_rounding
        if shift is None or rounding is None:
            return rounding if shift is None else shift
        return shift + rounding

    def forward(self, bias: Tensor | None) -> Tensor | None:
        """Return the bias, shape `[channels]` or `None`, with what is added to it now."""
        added = self.added
        if added is None:
            return bias
        return added if bias is None else bias + added

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"{self.name}, active={self.active and self.active.name}"
