"""Descent: Adam over random batches, keeping the best quantizers it comes past."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fxmpq.errors import FxmpqError
from fxmpq.refinement.best_seen import BestSeen

_CHECKS = 8


def check_rates(**rates: float) -> None:
    """Refuse rates that Adam cannot take; 0 means that a variable is not trained.

    Args:
        rates: By option name.

    Raises:
        FxmpqError: If one is no finite number from 0 on.
    """
    for name, rate in rates.items():
        if not 0 <= rate < math.inf:
            raise FxmpqError(f"{name} must be a finite number from 0 on; found {rate}")


def check_steps(steps: int) -> None:
    """Refuse less than one step.

    Raises:
        FxmpqError: With what was found.
    """
    if steps < 1:
        raise FxmpqError(f"steps must be at least 1; found {steps}")


def descend(
    rates: Sequence[tuple[Tensor, float]],
    loss: Callable[[int, float], Tensor],
    best: BestSeen,
    harden: Callable[[], float],
    *,
    steps: int,
    batches: int,
    seed: int,
) -> None:
    """Minimise a loss over random batches by Adam, and leave the best state seen in the modules.

    The rates fall to zero along half a cosine. The first check comes after an eighth of the
    steps, the last one at the end. It ends where the loss is no finite number any more.

    Args:
        rates: Variables, each with its rate; those of rate 0 are not trained.
        loss: Of a batch, by its number, and the share of the steps that are done.
        best: Holds the state from before.
        harden: Writes the variables into the modules and returns their error on all batches.
        steps: Of Adam.
        batches: How many there are.
        seed: Of the choice of batches.
    """
    groups = [{"params": [variable], "lr": rate} for variable, rate in rates if rate > 0]
    if not groups:
        return
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    checks = {math.ceil(steps * check / _CHECKS) for check in range(1, _CHECKS + 1)}
    order: list[int] = []
    for step in range(1, steps + 1):
        order = order or torch.randperm(batches, generator=generator).tolist()
        optimizer.zero_grad()
        with torch.enable_grad():
            found = loss(order.pop(), (step - 1) / steps)
            if not bool(torch.isfinite(found)):
                break
            torch.autograd.backward(found)
        optimizer.step()
        schedule.step()
        if step in checks:
            best.offer(harden())
    best.restore()
