"""The exact sweep: one group at a time, measured at the network's output."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, fx

from fxmpq.errors import FxmpqError
from fxmpq.graph.batches import Batch, flat_inputs, graph_device, materialize
from fxmpq.graph.run import float_outputs
from fxmpq.graph.state import Group, require
from fxmpq.sensitivity.scores import (
    AVERAGES,
    SCORES,
    Asked,
    OutputScore,
    Score,
    StartedOnce,
    find_score,
    is_metric,
    scorer,
    unit_of,
)
from fxmpq.sensitivity.sensitivity import Sensitivity
from fxmpq.sensitivity.signal import check_base, check_signal
from fxmpq.sensitivity.sweep import Sweep, measuring
from fxmpq.training.loss import LossFunction, on_device
from fxmpq.work import Work

if TYPE_CHECKING:
    from torchmetrics import Metric


def sqnr(
    graph: fx.GraphModule,
    batches: Iterable[Batch],
    *,
    score: Asked = "noise",
    average: str = "ratio",
    work: Work = Work(),
) -> Sensitivity:
    """Measure every (group, precision) alone, the rest of the network in float.

    Phase 1 of AMP (Pandey et al. 2023, arXiv:2302.05397), with ranges calibrated once rather
    than once per entry. What is measured at the output:

    | `score` | value of an entry | unit | needs labels |
    |---|---|---|---|
    | `"noise"` | noise over signal power, the inverse of the SQNR as a ratio | noise | no |
    | `"kl"` | mean `KL(softmax(y) || softmax(y_q))` of the first output, in nats | loss | no |
    | `loss(model, batch)` | the loss's increase over float | loss | if the loss does |
    | a torchmetrics metric | its change for the worse, on the first output | loss | yes |

    Noise is averaged over samples `n`, with floating-point outputs `y_n` and errors `e_n`:

    | `average` | value | |
    |---|---|---|
    | `"ratio"` | `sum_n ||e_n||^2 / sum_n ||y_n||^2` | adds up over independent errors |
    | `"samples"` | `mean_n (||e_n||^2 / ||y_n||^2)` | adds up; all samples count the same |
    | `"sqnr"` | `1 / mean_n (||y_n||^2 / ||e_n||^2)` | the mean SQNR, as published |

    The last ranks and predicts nothing (unit `score`): a sample with hardly any error outweighs
    the others, so each counts for at most 120 dB.

    Cost: one forward pass per (group, precision), of which only the nodes downstream of the
    group are run again; the float values of one batch are kept in memory. A metric is computed
    over all batches at once, entry by entry, so it also costs one float pass per group. No
    training.

    Args:
        graph: A calibrated graph.
        batches: What the model takes; with a loss, what the loss takes; with a metric, pairs
            `(what the model takes, target)`.
        score: What is measured.
        average: How noise is averaged over samples; with `score="noise"` only.
        work: Shows progress, and records one unit per (batch, group), or per group for a
            metric.

    Returns:
        Sensitivity without projections. Increases of a loss may be negative.

    Raises:
        FxmpqError: If the score or the average is unknown, or the outputs do not fit the score.
        CalibrationError: If there are no batches, or the float model's score is no number.

    Examples:
        >>> import fxmpq, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2)).eval()
        >>> batch = torch.randn(8, 4)
        >>> graph = fxmpq.calibrate(fxmpq.prepare(fxmpq.trace(model, batch), "reference"), [batch])
        >>> found = sqnr(graph, [batch])
        >>> found.value("0", "w8a8") < found.value("0", "w2a8")
        True
        >>> sqnr(graph, [batch], score="kl").unit
        'loss'
    """
    state = require(graph, stage="calibrated")
    if average not in AVERAGES:
        raise FxmpqError(f"no average {average!r} of noise; there are {', '.join(AVERAGES)}")
    found = find_score(score)
    if found is SCORES["noise"]:
        found = AVERAGES[average]
    elif average != "ratio":
        raise FxmpqError(f"average={average!r} averages noise; it goes with score='noise' only")
    values = increases(Sweep(graph), materialize(batches), found, work)
    return Sensitivity(values, method="sqnr", fingerprint=state.fingerprint, unit=unit_of(found))


def increases(
    sweep: Sweep, batches: Sequence[Batch], score: Score, work: Work
) -> dict[str, dict[str, float]]:
    """The increase of a score over the base, for every single group at each candidate.

    Args:
        sweep: Holds the graph and its base.
        batches: What the score takes.
        score: From `find_score`.
        work: Records one unit per (batch, group), or per group for a metric.

    Returns:
        Group to precision name to increase; for a metric, its change for the worse.

    Raises:
        CalibrationError: If the base's score is no number.
    """
    with measuring():
        if is_metric(score):
            return _metric_increases(sweep, batches, score, work)
        return _part_increases(sweep, batches, score, work)


def _part_increases(
    sweep: Sweep, batches: Sequence[Batch], score: OutputScore | LossFunction, work: Work
) -> dict[str, dict[str, float]]:
    groups = list(sweep.groups.values())
    found = scorer(score, sweep)
    base = weight = 0.0
    sums = {group.name: [0.0] * len(group.candidates) for group in groups}
    started = StartedOnce(found, batches[0])
    units = [(index, group) for index in range(len(batches)) for group in groups]
    for index, group in work.track(units, "sweep"):
        if group is groups[0]:
            started = StartedOnce(found, batches[index])
            part, batch_weight = work.unit(f"batch {index}", started.base)
            check_base(part)
            base, weight = base + part, weight + batch_weight
        parts = work.unit(f"batch {index}, {group.name}", partial(started.parts, _entries(group)))
        sums[group.name] = [a + b for a, b in zip(sums[group.name], parts, strict=True)]
    check_signal(weight)
    finish = score.finish if isinstance(score, OutputScore) else float
    return {
        group.name: {
            str(candidate): finish(total / weight) - finish(base / weight)
            for candidate, total in zip(group.candidates, sums[group.name], strict=True)
        }
        for group in groups
    }


def _metric_increases(
    sweep: Sweep, batches: Sequence[Batch], metric: Metric, work: Work
) -> dict[str, dict[str, float]]:
    """Whole metrics, since one over several batches is not the sum of one per batch."""
    pairs = [_pair(batch) for batch in batches]
    sign = -1.0 if metric.higher_is_better else 1.0
    (base,) = work.unit("base", partial(_metric_values, sweep, pairs, metric, [{}]))
    check_base(base)
    values = {}
    for group in work.track(list(sweep.groups.values()), "sweep"):
        entries = _entries(group)
        found = work.unit(
            f"group {group.name}", partial(_metric_values, sweep, pairs, metric, entries)
        )
        values[group.name] = {
            str(candidate): sign * (value - base)
            for candidate, value in zip(group.candidates, found, strict=True)
        }
    return values


def _metric_values(
    sweep: Sweep,
    pairs: Sequence[tuple[Any, Any]],
    metric: Metric,
    entries: Sequence[dict[str, str]],
) -> list[float]:
    device = graph_device(sweep.network)
    metrics = [metric.clone().to(device) for _ in entries]
    for own in metrics:
        own.reset()
    for inputs, target in pairs:
        sweep.start(flat_inputs(sweep.network, inputs))
        truth = on_device(target, device)
        for own, changes in zip(metrics, entries, strict=True):
            outputs = float_outputs(sweep.outputs(changes))
            if not outputs:
                raise FxmpqError("the model returns no floating-point output for the metric")
            own.update(outputs[0], truth)
    return [_scalar(own) for own in metrics]


def _scalar(metric: Metric) -> float:
    value = metric.compute()
    if not isinstance(value, Tensor) or value.numel() != 1:
        shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise FxmpqError(
            f"{type(metric).__name__} computes {shape}; a score is one number, so average over "
            "classes (average='macro') or outputs"
        )
    return float(value)


def _pair(batch: Batch) -> tuple[Any, Any]:
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return batch[0], batch[1]
    raise FxmpqError(
        "with a metric as score, a batch is a pair (what the model takes, target); found a "
        f"{type(batch).__name__} of length {len(batch)}"
    )


def _entries(group: Group) -> list[dict[str, str]]:
    return [{group.name: str(candidate)} for candidate in group.candidates]
