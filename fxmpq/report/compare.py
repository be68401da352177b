"""Compare: float, mixed and uniform plans, each converted for the target and measured there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxmpq.costs.cost import COSTS
from fxmpq.costs.table import CostTable
from fxmpq.errors import BatchError
from fxmpq.formats import Precision
from fxmpq.graph.batches import Batch, batch_size, call_arguments, first_sample, materialize
from fxmpq.graph.run import run_batch
from fxmpq.graph.state import copy_graph, require, with_state
from fxmpq.quantized import Quantized
from fxmpq.report.latency import latency_ms, use_threads
from fxmpq.report.metrics import METRICS, Tally, collect_outputs
from fxmpq.report.report import Entry, finite_or_none
from fxmpq.steps import apply
from fxmpq.targets.convert import convert
from fxmpq.targets.target import Converted

FLOAT, MIXED = "float", "mixed"


@dataclass(frozen=True)
class Comparison:
    """What `compare` found.

    Args:
        entries: Measurements by name: `float`, `mixed`, and each uniform precision.
        converted: The mixed model on its target.
        latency_samples: Batch size of the measured latencies.
    """

    entries: Mapping[str, Entry]
    converted: Converted
    latency_samples: int


def compare(
    quantized: Quantized,
    batches: Sequence[Batch],
    labels: Tensor,
    *,
    metric: str = "accuracy",
    uniform: Sequence[str] | None = None,
    output: str | Path | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Comparison:
    """Convert the float, the mixed and the uniform plans for the target, and measure each.

    Every model runs on the same runtime, the float one included, with one thread. Uniform plans
    are refined in the same way as the mixed one, on the same batches. SQNR is
    against the traced float model in PyTorch. Latency is that of one sample where the traced
    graph leaves the batch size free, else of the first batch.

    Args:
        quantized: From `quantize`.
        batches: Test data, what the model takes.
        labels: What the metric takes, for the samples of all batches: classes, int64 `[samples]`,
            or token ids, int64 `[samples, length]`.
        metric: A key of `METRICS`.
        uniform: Precisions for the uniform plans; those of `uniform_precisions` if `None`.
            A group that lacks one takes its nearest, as `CostTable.uniform` says.
        output: Folder to write the converted mixed model to.
        say: Told what is being done.

    Returns:
        The measurements, and the converted mixed model.

    Raises:
        BatchError: If batches or labels do not fit the model.
        TargetError: If a conversion disagrees with its simulation.
    """
    found = materialize(batches, what="test")
    tested = _with_labels(found, labels)
    # Labels that do not fit are refused before any conversion.
    Tally(METRICS[metric]).add(_float_outputs(quantized, found[0]), tested[0][1])
    names = uniform_precisions(quantized.costs) if uniform is None else uniform
    plans = {str(Precision.parse(name)): quantized.costs.uniform(name) for name in names}
    graphs = {
        FLOAT: float_graph(quantized.calibrated),
        MIXED: quantized.graph,
        **{name: _simulated(quantized, name, choices, say) for name, choices in plans.items()},
    }
    plans[MIXED] = dict(quantized.plan.choices)
    sample = first_sample(quantized.calibrated, found[0])
    with use_threads(1):
        converted: dict[str, Converted] = {}
        for name, graph in graphs.items():
            say(f"converting {name}")
            written = output if name == MIXED else None
            converted[name] = convert(graph, quantized.target, written, verify=found[:1])
        say(f"testing on {len(labels):,} samples")
        tallies = {name: Tally(METRICS[metric]) for name in converted}
        # A batch goes through all of them at once: outputs of all batches may be too large to keep.
        for batch, part in tested:
            reference = _float_outputs(quantized, batch)
            for name, tally in tallies.items():
                (outputs,) = collect_outputs(converted[name].run, [batch])
                tally.add(outputs, part, reference)
        say("measuring latency")
        times = latency_ms({name: model.run for name, model in converted.items()}, sample)
    entries = {
        name: Entry(
            score=tally.value,
            sqnr_db=finite_or_none(tally.sqnr_db),
            weight_bytes=_total(quantized.costs, "weights", plans.get(name)),
            bops=_total(quantized.costs, "bops", plans.get(name)),
            latency_ms=times[name],
            costs=_own_costs(quantized.costs, plans.get(name)),
        )
        for name, tally in tallies.items()
    }
    return Comparison(entries, converted[MIXED], _samples(sample))


def _with_labels(batches: Sequence[Batch], labels: Tensor) -> list[tuple[Batch, Tensor]]:
    """Each batch with the labels of its samples."""
    sizes = [_samples(batch) for batch in batches]
    if len(labels) != sum(sizes):
        raise BatchError(f"there are {len(labels)} labels for {sum(sizes)} samples")
    return list(zip(batches, torch.split(labels, sizes), strict=True))


def _samples(batch: Batch) -> int:
    return batch_size(pytree.tree_leaves(call_arguments(batch)))


def _float_outputs(quantized: Quantized, batch: Batch) -> list[Tensor]:
    (found,) = collect_outputs(lambda batch: run_batch(quantized.calibrated, batch), [batch])
    return found


def _simulated(
    quantized: Quantized, name: str, choices: Mapping[str, str], say: Callable[[str], None]
) -> fx.GraphModule:
    """A uniform plan's graph, refined as the mixed one is: else it would be no fair comparison."""
    if quantized.refinement is not None:
        say(f"refining {name} ({quantized.refinement})")
    return quantized.simulate(choices)


def uniform_precisions(costs: CostTable) -> tuple[str, ...]:
    """The precisions worth a uniform plan: every candidate, from many bits to few.

    Float is left out, and so is a weight-only precision that is only the half of another, as
    an embedding's `w4` is of `w4a8`, and what only products of activations take, as `a8`.

    Examples:
        >>> costs = CostTable({"weights": {"a": {"w4": 5, "w8": 9}, "b": {"w4a8": 5, "w8a8": 9}}})
        >>> uniform_precisions(costs)
        ('w8a8', 'w4a8')
    """
    found = {Precision.parse(name) for group in costs.groups for name in costs.precisions(group)}
    halves = {entry.weight_only for entry in found if entry.activation_bits is not None}
    wanted = [entry for entry in found if entry.weight is not None and entry not in halves]
    return tuple(str(entry) for entry in sorted(wanted, key=lambda e: e.sort_key, reverse=True))


def float_graph(graph: fx.GraphModule) -> fx.GraphModule:
    """A calibrated graph with every group in float, which `convert` takes like any plan's.

    Args:
        graph: From `calibrate`; not changed.

    Returns:
        The baseline to measure quantized models against on the same runtime.
    """
    state = require(graph, stage="calibrated")
    groups = tuple(replace(group, candidates=(Precision(),)) for group in state.groups)
    only_float = with_state(copy_graph(graph), replace(state, groups=groups))
    return apply(only_float, {group.name: str(Precision()) for group in groups})


def _total(costs: CostTable, metric: str, choices: Mapping[str, str] | None) -> int:
    total = costs.float_total[metric] if choices is None else costs.total(metric, choices)
    return round(total)


def _own_costs(costs: CostTable, choices: Mapping[str, str] | None) -> dict[str, float]:
    """Totals in the metrics that not every target has; of the float model where they are known."""
    own = [metric for metric in costs.metrics if metric not in COSTS]
    if choices is None:
        return {m: costs.float_total[m] for m in own if m in costs.float_total}
    return {metric: costs.total(metric, choices) for metric in own}
