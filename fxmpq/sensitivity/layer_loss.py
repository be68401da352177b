"""Layer loss: what the loss gains when one group is lowered and the rest stays at a base."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from torch import fx

from fxmpq.errors import FxmpqError
from fxmpq.formats import Precision
from fxmpq.graph.batches import Batch, materialize
from fxmpq.graph.state import require
from fxmpq.sensitivity.scores import Asked, find_score
from fxmpq.sensitivity.sensitivity import Sensitivity
from fxmpq.sensitivity.sqnr import increases
from fxmpq.sensitivity.sweep import Sweep
from fxmpq.work import Work


def layer_loss(
    graph: fx.GraphModule,
    batches: Iterable[Batch],
    *,
    score: Asked = "kl",
    base: Mapping[str, str] | None = None,
    floor: float = 1e-6,
    work: Work = Work(),
) -> Sensitivity:
    """Measure the loss increase of each group lowered alone, the rest at the base.

    The value of group `g` at precision `c` is

        `max(L(base with g at c) - L(base), floor)`, and 0 at the base's own precision,

    with `L` the score on the calibration data: by default the mean KL divergence from the
    float model's outputs, in nats, which needs no labels; with a loss, the labelled loss; with
    a torchmetrics metric, its change for the worse (the integer program of CalibTIP, Hubara
    et al. 2020, arXiv:2006.10518, whose base is 8 bit everywhere). Against `sqnr`, which
    leaves the rest in float, it measures around a point near which plans lie. The floor keeps
    noise in the loss from paying a solver for fewer bits.

    Cost: one forward pass per (group, precision) other than the base, of which only the nodes
    downstream of what changes are run again, and one float pass; the base's values of one
    batch are kept in memory. No training; no reconstruction of the lowered layers.

    Args:
        graph: A calibrated graph.
        batches: What the model takes; with a loss, what the loss takes; with a metric, pairs
            `(what the model takes, target)`.
        score: As in `sqnr`.
        base: Precision per group; groups left out stay at their widest candidate.
        floor: Smallest value of an entry other than the base, in the score's unit.
        work: Shows progress, and records one unit per (batch, group), or per group for a
            metric.

    Returns:
        Sensitivity of unit `loss`, without projections.

    Raises:
        FxmpqError: If the score, a group or precision of the base is unknown, or the floor is
            negative.
        CalibrationError: If there are no batches, or the base's score is no number.

    Examples:
        >>> import fxmpq, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2)).eval()
        >>> batch = torch.randn(8, 4)
        >>> prepared = fxmpq.prepare(
        ...     fxmpq.trace(model, batch), "reference", candidates=["w2a8", "w8a8"]
        ... )
        >>> found = layer_loss(fxmpq.calibrate(prepared, [batch]), [batch])
        >>> found.value("0", "w8a8"), found.value("0", "w2a8") > 1e-6
        (0.0, True)
    """
    state = require(graph, stage="calibrated")
    found = find_score(score)
    if not (math.isfinite(floor) and floor >= 0):
        raise FxmpqError(f"the floor of an increase is 0 or more; got {floor}")
    widest = {
        group.name: str(max(group.candidates, key=lambda candidate: candidate.sort_key))
        for group in state.groups
    }
    start = {
        name: str(Precision.parse(precision))
        for name, precision in {**widest, **(base or {})}.items()
    }
    rises = increases(Sweep(graph, start), materialize(batches), found, work)
    values = {
        group: {
            name: 0.0 if name == start[group] else max(rise, floor) for name, rise in row.items()
        }
        for group, row in rises.items()
    }
    # Noise too: what the base adds to it is in no value, so that no SQNR can be told from them.
    return Sensitivity(values, method="layer_loss", fingerprint=state.fingerprint, unit="loss")
