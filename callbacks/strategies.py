"""Several processes: which strategies work, and one plan for all."""

from __future__ import annotations

from dataclasses import replace

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import (
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    Strategy,
)
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher

from fxmpq.quantized import Quantized
from fxmpq.solver.plan import Plan

_SHARDED = (DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy)


def check_strategy(strategy: Strategy, stage: str) -> None:
    """Refuse strategies under which a whole network cannot be quantized and kept.

    Args:
        strategy: The Trainer's.
        stage: `fit`, `validate`, `test` or `predict`.

    Raises:
        MisconfigurationException: If a process holds only a part of the weights, or if
            training runs in processes that end with it.

    Examples:
        >>> from lightning.pytorch.strategies import DDPStrategy
        >>> check_strategy(DDPStrategy(), "fit")
    """
    name = type(strategy).__name__
    if isinstance(strategy, _SHARDED):
        raise MisconfigurationException(
            f"{name} gives each process only a part of every weight, which cannot be quantized; "
            "run the callback on one device or with strategy='ddp'"
        )
    if stage == "fit" and isinstance(strategy.launcher, _MultiProcessingLauncher):
        raise MisconfigurationException(
            f"{name} trains in processes that end with the training, and the quantized network "
            "would end with them; use strategy='ddp', or train without the callback and run "
            "trainer.validate with MixedPrecisionCallback afterwards"
        )


def share_plan(trainer: Trainer, quantized: Quantized) -> Quantized:
    """Apply the first process's plan in every process.

    Args:
        trainer: The running Trainer; every process must call this.
        quantized: What this process found.

    Returns:
        With the first process's plan, and the graph that simulates it.
    """
    plan = Plan.from_json(trainer.strategy.broadcast(quantized.plan.to_json()))
    if plan == quantized.plan:
        return quantized
    return replace(quantized, plan=plan, graph=quantized.simulate(plan))
