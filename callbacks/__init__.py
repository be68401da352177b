"""Lightning callbacks: quantization inside a `Trainer` run."""

from __future__ import annotations

from fxmpq.callbacks.mixed_precision import MixedPrecisionCallback

__all__ = ["MixedPrecisionCallback"]
