"""Further costs, which are worked out where they are asked for by name: one table, a line each."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import fx

from fxmpq.costs.activation_memory import activation_memory
from fxmpq.costs.energy import energy
from fxmpq.costs.file_size import Write, file_size
from fxmpq.costs.latency.cost import latency_cost
from fxmpq.costs.latency.runtime import Runtime
from fxmpq.costs.parts import MetricParts
from fxmpq.costs.table import CostTable
from fxmpq.errors import FxmpqError, closest
from fxmpq.graph.rules import TargetRules


@dataclass(frozen=True)
class Subject:
    """What a further metric is worked out from.

    Args:
        graph: From `prepare` or later; not changed.
        rules: Of the target it was prepared for.
        write: Writes the files that `convert` writes for the target.
        runtime: What runs the target's models; `None` if nothing on this machine does.
        progress: Whether to show progress bars.
    """

    graph: fx.GraphModule
    rules: TargetRules
    write: Write
    runtime: Runtime | None = None
    progress: bool = False


@dataclass(frozen=True)
class FurtherMetric:
    """A cost that takes more than counting.

    Args:
        rule: Works it out for all groups and candidates.
        unit: What it is in: `ms`, `B` or `pJ`.
        is_measured: Whether it takes a runtime on this machine.
    """

    rule: Callable[[Subject], MetricParts]
    unit: str
    is_measured: bool = False


def _latency(subject: Subject) -> MetricParts:
    assert subject.runtime is not None
    return latency_cost(subject.graph, subject.rules, subject.runtime, progress=subject.progress)


def _activation_memory(subject: Subject) -> MetricParts:
    return activation_memory(subject.graph, subject.rules)


def _file_size(subject: Subject) -> MetricParts:
    return file_size(subject.graph, subject.write, progress=subject.progress)


def _energy(subject: Subject) -> MetricParts:
    return energy(subject.graph)


FURTHER: Mapping[str, FurtherMetric] = {
    "latency": FurtherMetric(_latency, "ms", is_measured=True),
    "file_size": FurtherMetric(_file_size, "B"),
    "activation_memory": FurtherMetric(_activation_memory, "B"),
    "energy": FurtherMetric(_energy, "pJ"),
}


def units_of(metrics: Iterable[str], own: Collection[str]) -> dict[str, str]:
    """The units of further metrics.

    Args:
        metrics: Names of any metrics.
        own: Names of a target's own, whose units nobody knows.

    Returns:
        By name; without metrics that have none.

    Examples:
        >>> units_of(["weights", "cycles", "energy"], own=["cycles"])
        {'energy': 'pJ'}
    """
    return {name: FURTHER[name].unit for name in metrics if name in FURTHER and name not in own}


def further_metrics(asked: str | Iterable[str] | None) -> tuple[str, ...]:
    """Read names of further metrics.

    Args:
        asked: A name, several, or none.

    Returns:
        The names, each once.

    Raises:
        FxmpqError: If there is no such metric.

    Examples:
        >>> further_metrics("latency")
        ('latency',)
    """
    names = (asked,) if isinstance(asked, str) else tuple(asked or ())
    for name in names:
        if name not in FURTHER:
            raise FxmpqError(f"no further cost {name!r}; there are {closest(name, FURTHER)}")
    return tuple(dict.fromkeys(names))


def check_further(names: Sequence[str], target: str, runtime: Runtime | None) -> None:
    """Refuse metrics that have to be measured where nothing can be.

    Args:
        names: Keys of `FURTHER`.
        target: The target's name.
        runtime: What runs its models here; `None` if they cannot be measured.

    Raises:
        FxmpqError: Naming the metric, and what would work.
    """
    for name in names:
        if FURTHER[name].is_measured and runtime is None:
            raise FxmpqError(
                f"{name} cannot be measured for target {target!r} layer by layer on this machine. "
                "Measure it where its models run and read the figures with fxmpq.read_costs, or "
                "prepare for a target that can be measured, as 'onnxruntime'"
            )


def with_further(table: CostTable, names: Sequence[str], subject: Subject) -> CostTable:
    """Add further metrics to a cost table.

    Args:
        table: From `count`.
        names: Keys of `FURTHER`; one that the table has already, as a metric of the target's
            own, is left as it is.
        subject: What they are worked out from, and with, as `check_further` has it.

    Returns:
        The table with the metrics behind its own.
    """
    found = {name: FURTHER[name].rule(subject) for name in names if name not in table.metrics}
    totals = {n: parts.float_total for n, parts in found.items() if parts.float_total is not None}
    sums = {name: parts for name, parts in found.items() if parts.rows is not None}
    rows = {name: parts.rows for name, parts in sums.items() if parts.rows is not None}
    return replace(
        table,
        costs={**table.costs, **rows},
        fixed={**table.fixed, **{name: parts.fixed for name, parts in sums.items()}},
        float_total={**table.float_total, **totals},
        edges={**table.edges, **{name: parts.edges for name, parts in sums.items()}},
        moments={
            **table.moments,
            **{name: parts.moments for name, parts in found.items() if parts.rows is None},
        },
    )
