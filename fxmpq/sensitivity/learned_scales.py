"""LIMPQ's indicators: steps of all widths, learned together, as the importance of layers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import fx

from fxmpq.errors import FxmpqError
from fxmpq.formats import NumberFormat
from fxmpq.graph.state import Group, require
from fxmpq.quantizers.learned import LearnedQuantizer
from fxmpq.sensitivity.indicators import GUARDS, indicator_scores
from fxmpq.sensitivity.sensitivity import Sensitivity
from fxmpq.training.fit import check_training, finite_loss, fit
from fxmpq.training.loss import LossFunction
from fxmpq.training.trainable import (
    begin_steps,
    group_quantizers,
    learned_quantizers,
    switch_off,
    tensor_powers,
    trainable,
)
from fxmpq.work import Work


def learned_scales(
    graph: fx.GraphModule,
    batches: Sequence[object],
    *,
    loss: LossFunction,
    epochs: int = 3,
    learning_rate: float = 1e-3,
    alpha: float = 2.0,
    guard: str = "monotone",
    relative: bool = False,
    seed: int = 0,
    work: Work = Work(),
) -> Sensitivity:
    """Score every (group, precision) by the quantization steps that training arrives at.

    Every activation and every weight gets one learned step per candidate width (LSQ, per
    tensor), all on one set of weights. Each optimizer step adds up the gradients of one pass per
    width, the whole network at that width, from wide to narrow, and of one more pass in which
    every group draws its width at random. A coarser grid that the training had to accept is a
    layer that suffers more:

        score(g, w<b>a<c>) = sum_{activations of g} s_c + alpha * sum_{layers of g} s_b

    with `s_b` the learned step at `b` bits; weights and activations are independent of each
    other, so all combinations come from the same training (LIMPQ, Tang et al. 2022,
    arXiv:2203.08368). Where a tensor has no step of a pass's width it takes its next wider one,
    or its widest. Steps must grow as bits shrink; what `guard` does where one did not:

    - `monotone` raises it to the step of the next wider width;
    - `forbid` is the published rule, which forbids the entry: its score exceeds the sum of all
      others, so that a solver takes it only where the budget leaves no other choice.

    The published score compares steps of different tensors as they are, which supposes tensors
    of like magnitude, as behind batch norms; here these are folded. `relative` puts
    `s^2 / E[x^2]` in the place of each step, in proportion to the noise of rounding a tensor
    relative to its own power.

    Further differences from the published method: tensors with negative values keep their
    calibrated zero points; a step's upper bound, published as 1, is the tensor's largest
    magnitude where that is more (`LearnedQuantizer`); the first steps of activations come from
    a float pass; batch norms being folded, the learning rate is a tenth of the published 0.01.
    A few batches hardly move the steps, so that the score is mostly their first value.

    Cost: `epochs * (widths + 1)` forward and backward passes over the batches, and two forward
    passes over the first. Needs labels, or whatever `loss` takes, and training, on a copy.

    Args:
        graph: A calibrated graph; not changed.
        batches: What `loss` takes.
        loss: `loss(model, batch)`, the mean over the batch's samples.
        epochs: How often the batches are gone through.
        learning_rate: Where the cosine begins.
        alpha: What a weight's step counts against an activation's; not negative.
        guard: `monotone` or `forbid`.
        relative: Whether steps count relative to the power of what they round.
        seed: Of the order of batches and of the random widths.
        work: Progress and journal; the training is one unit.

    Returns:
        A sensitivity of unit `score`.

    Raises:
        FxmpqError: If an option is out of range, the loss is no finite scalar, or the training
            diverges.

    Examples:
        >>> from fxmpq.calibration.calibrate import calibrate
        >>> from fxmpq.graph.trace import trace
        >>> from fxmpq.training.loss import classification_loss
        >>> from fxmpq.steps import prepare
        >>> images = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2))
        >>> graph = prepare(trace(model, images), "reference", candidates=["w2a8", "w8a8"])
        >>> batches = [(images, images.argmax(1) % 2)]
        >>> graph = calibrate(graph, [images], progress=False)
        >>> found = learned_scales(graph, batches, loss=classification_loss)
        >>> found.value("0", "w2a8") > found.value("0", "w8a8")
        True
    """
    state = require(graph, stage="calibrated")
    check_training(batches, loss=loss, epochs=epochs, learning_rate=learning_rate)
    if not (math.isfinite(alpha) and alpha >= 0):
        raise FxmpqError(f"alpha is {alpha!r}; it must be finite and not negative")
    if guard not in GUARDS:
        raise FxmpqError(f"no guard {guard!r}; there are {', '.join(map(repr, GUARDS))}")
    learning = trainable(graph)
    quantizers = learned_quantizers(learning)

    def train() -> list[float]:
        def run() -> object:
            return finite_loss(loss, learning, batches[0])

        begin_steps(learning, state.groups, run)
        generator = torch.Generator().manual_seed(seed)
        fit(
            learning,
            batches,
            loss=loss,
            epochs=epochs,
            learning_rate=learning_rate,
            passes=lambda: _joint_passes(learning, state.groups, generator),
            seed=seed,
            shown=work.shown,
        )
        steps = [float(q.step(entry).detach()) for q in quantizers.values() for entry in q.formats]
        return steps + list(tensor_powers(learning, run).values())

    numbers = iter(work.unit("training", train))
    steps = {
        name: {entry: next(numbers) for entry in quantizer.formats}
        for name, quantizer in quantizers.items()
    }
    powers = dict(zip(quantizers, numbers, strict=True))
    if relative:
        steps = {
            name: {
                entry: step**2 / powers[name] if powers[name] else 0.0
                for entry, step in row.items()
            }
            for name, row in steps.items()
        }
    values = indicator_scores(state.groups, steps, alpha=alpha, guard=guard)
    return Sensitivity(values, method="learned_scales", fingerprint=state.fingerprint, unit="score")


def _joint_passes(
    graph: fx.GraphModule, groups: Sequence[Group], generator: torch.Generator
) -> Iterator[int]:
    """Switch to one uniform pass per width, from wide to narrow, then to random widths."""
    every = {entry.bits for q in learned_quantizers(graph).values() for entry in q.formats}
    widths = sorted(every, reverse=True)
    for bits in widths:
        for group in groups:
            _switch_to_width(graph, group, bits)
        yield bits
    for group in groups:
        drawn = int(torch.randint(len(widths), (), generator=generator))
        _switch_to_width(graph, group, widths[drawn])
    yield 0
    switch_off(graph)


def _switch_to_width(graph: fx.GraphModule, group: Group, bits: int) -> None:
    """Switch a group's weights and activations to a width, or to their next wider one."""
    for _, quantizer, _ in group_quantizers(graph, group):
        quantizer.activate(_at_least(quantizer, bits))


def _at_least(quantizer: LearnedQuantizer, bits: int) -> NumberFormat | None:
    rising = sorted(quantizer.formats, key=lambda entry: entry.bits)
    wide_enough = [entry for entry in rising if entry.bits >= bits]
    return next(iter([*wide_enough, *reversed(rising)]), None)
