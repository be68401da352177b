"""The signal that noise is measured against, and other totals that must be usable."""

from __future__ import annotations

import math

import torch
from torch import Tensor

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


def check_samples(powers: Tensor) -> None:
    """Refuse a batch that holds a sample against which no noise can be measured.

    Args:
        powers: Squared float outputs summed per sample, `[samples]`.

    Raises:
        CalibrationError: If one is zero, NaN or infinite.
    """
    silent = torch.nonzero(powers == 0).flatten().tolist()
    if silent and len(silent) < len(powers):
        raise CalibrationError(
            f"the model's outputs are all zero for sample {silent[0]} of a batch, so it has no "
            "ratio of its own; leave it out, or take average='ratio', which needs none"
        )
    check_signal(float(powers.sum()))


def check_base(value: float) -> None:
    """Refuse a score that is no number before anything is changed.

    Args:
        value: The score of the base.

    Raises:
        CalibrationError: If it is NaN or infinite.
    """
    if not math.isfinite(value):
        raise CalibrationError(
            f"the score of the unchanged model is {value}, so no increase over it can be "
            "measured; check the model's outputs, the data and the labels"
        )
