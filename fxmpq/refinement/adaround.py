"""AdaRound: each weight rounded up or down, learned for all of a layer's weights together."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from fxmpq.errors import FxmpqError
from fxmpq.graph.batches import Batch
from fxmpq.graph.state import Refinement
from fxmpq.quantizers.soft_rounding import (
    hard_codes,
    rectified_sigmoid,
    rounding_penalty,
    rounding_start,
)
from fxmpq.refinement.rounding import RoundingProblem, round_layers
from fxmpq.refinement.units import Units

_FIRST_BETA, _LAST_BETA = 20.0, 2.0
_CHECK = 50
_DAMPING = 0.01


@dataclass(frozen=True)
class Schedule:
    """How long to train, and how hard to push to whole codes.

    Args:
        steps: Of Adam.
        rate: Of Adam.
        penalty: Weight of the rounding penalty.
        warmup: Share of the steps before it sets in.

    Raises:
        FxmpqError: If one is out of its range.
    """

    steps: int
    rate: float
    penalty: float
    warmup: float

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise FxmpqError(f"steps must be at least 1; found {self.steps}")
        for name in ("rate", "penalty"):
            if not 0 < getattr(self, name) < math.inf:
                raise FxmpqError(
                    f"{name} must be a finite number above 0; found {getattr(self, name)}"
                )
        if not 0 <= self.warmup < 1:
            raise FxmpqError(f"warmup must be a share of the steps in [0, 1); found {self.warmup}")

    def beta(self, step: int) -> float | None:
        """The penalty's exponent, falling from 20 to 2; `None` while there is no penalty yet."""
        first = self.warmup * self.steps
        if step < first:
            return None
        done = (step - first) / (self.steps - first)
        return _FIRST_BETA + (_LAST_BETA - _FIRST_BETA) * done


def adaround(
    graph: fx.GraphModule,
    batches: Sequence[Batch],
    *,
    units: Units,
    steps: int = 1000,
    rate: float = 0.01,
    penalty: float = 0.01,
    warmup: float = 0.2,
) -> list[Refinement]:
    """Learn for each weight whether to round it up or down, so that the layer's output stays.

    With `w_0` the weight that is best on the layer's quantized input, each weight may take the
    codes above and below `w_0 / scale`, `q = lower + h(v)`, where `h` is a stretched sigmoid cut
    off at 0 and 1. Adam minimises over `v`

        f(q) / c + penalty * sum (1 - |2 h(v) - 1|^beta)

    per channel, where `f` is the mean squared error of its output from the float one, bias
    included, and `c` the mean over its weights of what moving one code by 1 adds to it. `beta`
    falls from 20 to 2 once the warm-up is over, which drives every `h` to 0 or 1 (AdaRound, Nagel
    et al. 2020, arXiv:2004.10568). Since `f` is a quadratic form, known from second moments that
    one pass over the inputs gathers, every step sees all samples and takes one matrix product.

    Training starts at the present codes, such as those that `gptq` found. One that is no neighbour
    of its weight is paired with the next one on the weight's side. Every 50 steps the hard codes
    are compared with the best so far, channel by channel, the present ones first of all: so it
    never does worse than these, which the plain method may. Layers come in graph order, each on
    what earlier ones became; float formats and embeddings stay as they are.

    Args:
        graph: With chosen precisions; codes and bias shifts are changed.
        batches: What the model takes.
        units: Shows progress and keeps finished layers.
        steps: Of Adam for each layer.
        rate: Of Adam.
        penalty: Weight of the rounding penalty.
        warmup: Share of the steps before the penalty sets in.

    Returns:
        Relative squared error of each layer's output before and after; `after` is never more.

    Raises:
        FxmpqError: If an option is out of its range.
    """
    schedule = Schedule(steps, rate, penalty, warmup)

    def propose(problem: RoundingProblem) -> Iterator[Tensor]:
        return learned_codes(problem, schedule)

    return round_layers("adaround", graph, batches, units, propose)


def learned_codes(problem: RoundingProblem, schedule: Schedule) -> Iterator[Tensor]:
    """The codes that training has come to every 50 steps, and in the end.

    Args:
        problem: Training starts at its codes.
        schedule: How to train.

    Yields:
        Codes like the problem's. The last ones are those of plain AdaRound.
    """
    form, weight, scale = problem.form, problem.weight, problem.grid.scale
    target = weight + form.minimum(_DAMPING)
    lower, start = rounding_start(target, scale, problem.codes, problem.number_format)
    unit = (form.second.diagonal(dim1=1, dim2=2).unsqueeze(1) * scale.square()).mean(
        2, keepdim=True
    )
    unit = torch.where(unit > 0, unit, torch.ones_like(unit))
    # Hundreds of matrix products, in single precision; what they give is compared in double.
    second, cross, step_size = form.second.float(), form.cross.float(), scale.float()
    offset, force = (lower * scale - weight).float(), 2 / unit.float()
    v = start.float().requires_grad_()
    optimizer = torch.optim.Adam([v], lr=schedule.rate)
    for step in range(schedule.steps):
        with torch.enable_grad():
            h = rectified_sigmoid(v)
            change = offset + h * step_size
            slope = (change.detach() @ second - cross) * force
            loss = (slope * change).sum()
            beta = schedule.beta(step)
            if beta is not None:
                loss = loss + schedule.penalty * rounding_penalty(h, beta)
            (v.grad,) = torch.autograd.grad(loss, [v])
        optimizer.step()
        if (step + 1) % _CHECK == 0 or step + 1 == schedule.steps:
            yield hard_codes(lower, v.detach())
