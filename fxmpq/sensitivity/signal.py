"""The signal that noise is measured against."""

from __future__ import annotations

import math

from fxmpq.errors import CalibrationError


def check_signal(power: float) -> None:
    """Refuse outputs against which no noise can be measured.

    Args:
        power: Sum of the squared float outputs over all batches.

    Raises:
        CalibrationError: If it is zero, NaN or infinite.
    """
    if power == 0.0:
        raise CalibrationError(
            "the model's outputs are all zero on the measured batches, so no noise is relative to "
            "them; check the model's last layer and the data"
        )
    if not math.isfinite(power):
        raise CalibrationError(
            "the model's outputs hold NaN or infinite values on the measured batches; check the "
            "data's normalisation and the model's weights"
        )
