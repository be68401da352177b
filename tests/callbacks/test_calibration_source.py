from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, Trainer
from torch.utils.data import DataLoader

from fxmpq.callbacks.calibration_source import CalibrationSource
from fxmpq.errors import BatchError, CalibrationError

MakeTrainer = Callable[..., Trainer]


class Counted:
    """Yields numbers without end and counts them."""

    def __init__(self) -> None:
        self.taken = 0

    def __iter__(self) -> Iterator[int]:
        while True:
            self.taken += 1
            yield self.taken


class Numbers(LightningDataModule):
    """Its loader yields 0, 1, 2, ... from a number that grows with each request."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0

    def train_dataloader(self) -> DataLoader[Any]:
        self.asked += 1
        return DataLoader(range(self.asked, self.asked + 20), batch_size=None)


class NoTraining(LightningDataModule):
    """Has validation data only."""

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader([torch.zeros(1)])


@pytest.mark.parametrize("count", [1, 3])
def test_no_more_than_asked_is_taken(make_trainer: MakeTrainer, count: int) -> None:
    numbers = Counted()
    assert CalibrationSource(numbers, count).take(make_trainer()) == list(range(1, count + 1))
    assert numbers.taken == count
    assert CalibrationSource([1, 2], 5).take(make_trainer()) == [1, 2]


def test_an_iterators_batches_serve_every_run(make_trainer: MakeTrainer) -> None:
    source = CalibrationSource(iter([1, 2, 3]), 2)
    assert source.take(make_trainer()) == source.take(make_trainer()) == [1, 2]


def test_own_batches_come_before_the_datamodules(make_trainer: MakeTrainer) -> None:
    trainer, data = make_trainer(), Numbers()
    trainer.datamodule = data
    source = CalibrationSource([7], 2)
    source.check(trainer)
    assert source.take(trainer) == [7]
    assert data.asked == 0


def test_the_datamodule_is_asked_anew_each_time(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer()
    trainer.datamodule = Numbers()
    source = CalibrationSource(None, 2)
    source.check(trainer)
    assert [source.take(trainer), source.take(trainer)] == [[1, 2], [2, 3]]


def test_a_datamodule_made_of_datasets_will_do(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer()
    trainer.datamodule = LightningDataModule.from_datasets([torch.ones(1)] * 3, batch_size=1)
    source = CalibrationSource(None, 2)
    source.check(trainer)
    assert source.take(trainer) == [torch.ones(1, 1)] * 2


@pytest.mark.parametrize("data", [None, NoTraining()])
def test_a_run_without_batches_is_refused_with_both_remedies(
    make_trainer: MakeTrainer, data: LightningDataModule | None
) -> None:
    trainer = make_trainer()
    trainer.datamodule = data
    for step in (CalibrationSource(None, 2).check, CalibrationSource(None, 2).take):
        with pytest.raises(MisconfigurationException) as error:
            step(trainer)
        assert "calibration=loader" in str(error.value)
        assert "datamodule that has a train_dataloader" in str(error.value)


@pytest.mark.parametrize("batch", [torch.ones(2), {"x": torch.ones(2)}])
def test_one_batch_instead_of_several_is_refused(batch: object) -> None:
    with pytest.raises(BatchError, match=f"found one {type(batch).__name__}.*Wrap it in a list"):
        CalibrationSource(batch, 8)
    assert CalibrationSource([batch], 8).take(None) == [batch]


@pytest.mark.parametrize("count", [0, -3])
def test_a_count_that_takes_nothing_is_refused(count: int) -> None:
    with pytest.raises(CalibrationError, match=f"at least 1; found {count}"):
        CalibrationSource(None, count)
