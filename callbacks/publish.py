"""What a run shows and keeps of a plan: a file, the loggers' entries and progress bars."""

from __future__ import annotations

import math
from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import RichProgressBar

from fxmpq.solver.plan import Plan


def plan_metrics(plan: Plan) -> dict[str, float]:
    """A plan's scalars for a logger: totals per cost, shares of float, predicted noise.

    Args:
        plan: From `solve`.

    Returns:
        `fxmpq/<metric>`, `fxmpq/<metric>_relative`, `fxmpq/predicted_loss` and
        `fxmpq/predicted_sqnr_db`; without values that are unknown or infinite.

    Examples:
        >>> plan_metrics(Plan({"conv": "w4a8"}, costs={"weights": 120}, relative={"weights": 0.13}))
        {'fxmpq/weights': 120.0, 'fxmpq/weights_relative': 0.13}
    """
    found: dict[str, float | None] = {f"fxmpq/{name}": total for name, total in plan.costs.items()}
    found.update({f"fxmpq/{name}_relative": share for name, share in plan.relative.items()})
    found["fxmpq/predicted_loss"] = plan.loss
    found["fxmpq/predicted_sqnr_db"] = plan.sqnr_db
    return {
        name: float(value)
        for name, value in found.items()
        if value is not None and math.isfinite(value)
    }


def publish_plan(trainer: Trainer, plan: Plan, folder: str | Path | None) -> None:
    """Write `plan.json` and tell the loggers, from the first process only.

    Args:
        trainer: The running Trainer.
        plan: What was chosen.
        folder: Where to write, made if missing; `None` writes no file.
    """
    if not trainer.is_global_zero:
        return
    if folder is not None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        plan.to_json(Path(folder) / "plan.json")
    precisions = {"target": plan.target, "budget": plan.budget, "layers": dict(plan.layers)}
    for logger in trainer.loggers:
        logger.log_metrics(plan_metrics(plan), step=trainer.global_step)
        logger.log_hyperparams({"fxmpq": precisions})


def shows_progress(trainer: Trainer) -> bool:
    """Whether fxmpq's own bars fit in: the run has a bar, and this is the first process.

    A Rich display that still runs at the end of training is stopped, for two at a time
    overwrite each other; the run has nothing more to show in it.

    Args:
        trainer: The running Trainer.
    """
    bar = trainer.progress_bar_callback
    if bar is None or getattr(bar, "is_disabled", False) or not trainer.is_global_zero:
        return False
    if isinstance(bar, RichProgressBar) and bar.progress is not None:
        bar.progress.stop()
    return True
