"""Lightning callbacks: quantization inside a `Trainer` run."""

from __future__ import annotations

from fxmpq.callbacks.mixed_precision import MixedPrecisionCallback
from fxmpq.callbacks.quantization_aware_training import QuantizationAwareTraining

__all__ = ["MixedPrecisionCallback", "QuantizationAwareTraining"]
