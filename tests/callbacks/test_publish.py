from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger

from fxmpq.callbacks.publish import plan_metrics, publish_plan, shows_progress
from fxmpq.solver.plan import Plan

PLAN = Plan(
    {"conv": "w4a8"},
    layers={"conv": "w4a8", "down.sample": "w4a8"},
    target="reference",
    budget="weights=15%",
    loss=0.01,
    costs={"weights": 120, "bops": 4096},
    relative={"weights": 0.125},
)


def test_metrics_hold_every_finite_scalar_of_the_plan() -> None:
    assert plan_metrics(PLAN) == {
        "fxmpq/weights": 120,
        "fxmpq/bops": 4096,
        "fxmpq/weights_relative": 0.125,
        "fxmpq/predicted_loss": 0.01,
        "fxmpq/predicted_sqnr_db": pytest.approx(20),
    }
    assert plan_metrics(Plan({"conv": "fp32"}, loss=0.0)) == {"fxmpq/predicted_loss": 0}


def test_the_plan_is_written_to_a_new_folder_and_every_logger_hears_of_it(
    make_trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    loggers = [CSVLogger(tmp_path, name="one"), CSVLogger(tmp_path, name="two")]
    publish_plan(make_trainer(logger=loggers), PLAN, tmp_path / "deep" / "folder")
    assert Plan.from_json(tmp_path / "deep" / "folder" / "plan.json") == PLAN
    for logger in loggers:
        assert logger.experiment.metrics == [{**plan_metrics(PLAN), "step": 0}]
        layers = logger.experiment.hparams["fxmpq"]["layers"]
        assert layers == {"conv": "w4a8", "down.sample": "w4a8"}


def test_no_folder_and_no_logger_write_nothing(
    make_trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    publish_plan(make_trainer(), PLAN, None)
    assert list(tmp_path.iterdir()) == []


def test_other_processes_than_the_first_write_nothing(
    make_trainer: Callable[..., Trainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(logger=CSVLogger(tmp_path, name="log"))
    monkeypatch.setattr(Trainer, "is_global_zero", property(lambda _self: False))
    publish_plan(trainer, PLAN, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
    assert trainer.loggers[0].experiment.metrics == []
    assert not shows_progress(trainer)


class OwnBar(ProgressBar):
    """A bar of the user's, which has no switch to ask about."""


@pytest.mark.parametrize(
    ("bar", "shown"),
    [(OwnBar, True), (TQDMProgressBar, True), (lambda: TQDMProgressBar(refresh_rate=0), False)],
)
def test_bars_are_shown_where_the_run_has_one(
    make_trainer: Callable[..., Trainer], bar: Callable[[], Any], shown: bool
) -> None:
    trainer = make_trainer(enable_progress_bar=True, callbacks=[bar()])
    assert shows_progress(trainer) is shown
    assert not shows_progress(make_trainer(enable_progress_bar=False))


def test_a_running_rich_display_is_stopped(make_trainer: Callable[..., Trainer]) -> None:
    bar = RichProgressBar()
    trainer = make_trainer(enable_progress_bar=True, callbacks=[bar])
    bar.on_train_start(trainer, None)
    assert bar.progress.live.is_started
    assert shows_progress(trainer)
    assert not bar.progress.live.is_started
