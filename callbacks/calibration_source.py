"""Where a callback's calibration batches come from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from fxmpq.errors import BatchError, CalibrationError


class CalibrationSource:
    """The user's own batches, else the first ones of the datamodule's `train_dataloader`.

    The loaders of the running loop are never read: what is taken from them would be missing
    there.

    Args:
        batches: What the LightningModule's loaders yield; `None` asks the datamodule.
        count: How many to take at most.

    Raises:
        BatchError: If `batches` is a single tensor or mapping.
        CalibrationError: If `count` is less than one.

    Examples:
        >>> CalibrationSource([[1], [2], [3]], count=2).take(None)
        [[1], [2]]
    """

    def __init__(self, batches: Iterable[object] | None, count: int) -> None:
        if isinstance(batches, (Tensor, Mapping)):
            raise BatchError(
                f"calibration is an iterable of batches; found one {type(batches).__name__}. "
                "Wrap it in a list: [batch]"
            )
        if count < 1:
            raise CalibrationError(f"calibration_batches must be at least 1; found {count}")
        self._batches = batches
        self._count = count

    def check(self, trainer: Trainer | None) -> None:
        """Refuse a run that has no calibration batches.

        Raises:
            MisconfigurationException: With both ways to give some.
        """
        if self._batches is None:
            _datamodule(trainer)

    def take(self, trainer: Trainer | None) -> list[object]:
        """The batches, on the device where the loader leaves them.

        Own batches are kept, for an iterator yields them only once; the datamodule is asked
        anew each time.

        Raises:
            MisconfigurationException: If there are none to ask for.
        """
        if self._batches is None:
            return list(islice(_datamodule(trainer).train_dataloader(), self._count))
        taken = list(islice(self._batches, self._count))
        self._batches = taken
        return taken


def _datamodule(trainer: Trainer | None) -> LightningDataModule:
    found: LightningDataModule | None = getattr(trainer, "datamodule", None)
    if found is None or not is_overridden("train_dataloader", found):
        raise MisconfigurationException(
            "there are no calibration batches: pass them as MixedPrecisionCallback(..., "
            "calibration=loader), or run the Trainer with a datamodule that has a "
            "train_dataloader"
        )
    return found
