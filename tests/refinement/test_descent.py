from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, fx, nn

from fxmpq.errors import FxmpqError
from fxmpq.formats import NumberFormat
from fxmpq.quantizers.modules import BiasCorrection
from fxmpq.refinement.best_seen import BestSeen
from fxmpq.refinement.descent import check_rates, check_steps, descend

INT4 = NumberFormat(4)


class Bowl:
    """`(x - 3)^2` over three equal batches; `x` is written as a shift."""

    def __init__(self, start: float = 0.0) -> None:
        module = BiasCorrection("bowl")
        root = nn.Module()
        root.add_module("bias", module)
        self.graph = fx.GraphModule(root, fx.Graph())
        self.graph.add_submodule("bias", module)
        self.module = module
        self.x = torch.tensor([start], requires_grad=True)
        module.set_shift(INT4, self.x.detach().clone())
        self.batches: list[int] = []
        self.progress: list[float] = []
        self.hardened: list[float] = []
        self.best = BestSeen(self.graph, ["bias"], self.error())

    def error(self) -> float:
        shift = self.module.shift(INT4)
        assert shift is not None
        return float((shift - 3).square())

    def loss(self, batch: int, progress: float) -> Tensor:
        assert torch.is_grad_enabled()
        self.batches.append(batch)
        self.progress.append(progress)
        return (self.x - 3).square().sum()

    def harden(self) -> float:
        self.module.set_shift(INT4, self.x.detach().clone())
        self.hardened.append(self.error())
        return self.hardened[-1]

    def descend(self, rate: float, steps: int, seed: int = 0) -> None:
        with torch.no_grad():
            descend(
                [(self.x, rate)],
                self.loss,
                self.best,
                self.harden,
                steps=steps,
                batches=3,
                seed=seed,
            )


def test_it_finds_the_bottom() -> None:
    bowl = Bowl()
    bowl.descend(0.2, 90)
    assert bowl.error() < 0.01
    assert bowl.error() == bowl.best.error == min(bowl.hardened)


def test_a_rate_that_throws_it_out_leaves_what_was() -> None:
    bowl = Bowl(start=2.9)
    before = bowl.error()
    bowl.descend(1000.0, 9)
    assert bowl.hardened[-1] > before
    assert bowl.error() == before == bowl.best.error


def test_it_ends_where_the_loss_is_no_number_and_keeps_the_best() -> None:
    bowl = Bowl()
    loss = bowl.loss

    def failing(batch: int, progress: float) -> Tensor:
        return loss(batch, progress) * (math.nan if progress >= 0.5 else 1)

    bowl.loss = failing  # type: ignore[method-assign]
    bowl.descend(0.2, 40)
    assert len(bowl.batches) == 21
    assert bowl.x.isfinite()
    assert bowl.error() == bowl.best.error == min(bowl.hardened) < 9


def test_the_best_check_is_kept_not_the_last() -> None:
    bowl = Bowl(start=2.0)
    bowl.descend(1.0, 2)
    # Adam's first step is the rate itself, the second overshoots by half of it.
    assert bowl.hardened[0] == pytest.approx(0, abs=1e-9)
    assert bowl.error() == min(bowl.hardened) < bowl.hardened[-1] + 1e-9


def test_every_batch_is_seen_once_before_any_is_seen_again() -> None:
    bowl = Bowl()
    bowl.descend(0.1, 9)
    for start in (0, 3, 6):
        assert sorted(bowl.batches[start : start + 3]) == [0, 1, 2]
    again, other = Bowl(), Bowl()
    again.descend(0.1, 9)
    other.descend(0.1, 9, seed=1)
    assert again.batches == bowl.batches
    assert other.batches != bowl.batches


def test_progress_begins_at_zero_and_checks_are_spread_evenly() -> None:
    bowl = Bowl()
    bowl.descend(0.1, 16)
    assert bowl.progress == [step / 16 for step in range(16)]
    assert len(bowl.hardened) == 8
    short = Bowl()
    short.descend(0.1, 3)
    assert len(short.hardened) == 3


def test_the_rate_falls_to_zero() -> None:
    bowl = Bowl()
    positions: list[float] = []

    def slope(batch: int, progress: float) -> Tensor:
        positions.append(float(bowl.x.detach()))
        return -bowl.x.sum()

    bowl.loss = slope
    bowl.descend(1.0, 10)
    moves = [after - before for before, after in itertools.pairwise(positions)]
    assert moves[0] == pytest.approx(1.0, rel=0.1)
    assert moves[-1] < 0.1
    assert moves == sorted(moves, reverse=True)


def test_nothing_to_train_changes_nothing() -> None:
    bowl = Bowl()
    bowl.descend(0.0, 5)
    assert bowl.batches == []
    assert bowl.best.error == 9


@pytest.mark.parametrize("rate", [-1.0, math.nan, math.inf])
def test_rates_that_are_none_are_refused(rate: float) -> None:
    check_rates(weight_rate=0.0, bias_rate=1.0)
    with pytest.raises(FxmpqError, match="bias_rate must be a finite number"):
        check_rates(weight_rate=0.0, bias_rate=rate)


def test_less_than_one_step_is_refused() -> None:
    check_steps(1)
    with pytest.raises(FxmpqError, match="at least 1; found 0"):
        check_steps(0)
