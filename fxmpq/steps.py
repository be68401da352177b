"""The steps that take a target or a plan by name, in the order a user walks them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from torch import fx

from fxmpq.costs.cost import count
from fxmpq.costs.further import FURTHER, Subject, check_further, further_metrics, with_further
from fxmpq.costs.latency.runtime import Run, Runtime
from fxmpq.costs.table import CostTable
from fxmpq.errors import TargetError
from fxmpq.formats import Precision
from fxmpq.graph.candidates import read_candidates
from fxmpq.graph.patterns import Ties, read_exclude
from fxmpq.graph.prepare import insert_quantizers
from fxmpq.graph.state import require, require_groups
from fxmpq.graph.switch import with_choices
from fxmpq.solver.plan import Plan, choices_of
from fxmpq.targets.registry import TARGETS, get_target
from fxmpq.targets.target import Target


def prepare(
    graph: fx.GraphModule,
    target: str | Path | Target,
    *,
    candidates: Sequence[str | Precision] | None = None,
    keep: Mapping[str, str | Precision] | None = None,
    exclude: Sequence[str] = (),
    ties: Ties = (),
    products: bool = False,
) -> fx.GraphModule:
    """Group a graph's layers by a target's fusion rules and insert quantizers, all off.

    Args:
        graph: From `trace`; copied, not changed.
        target: A target's name, as `reference` or `onnxruntime`, or a TOML file that describes
            one, as `npu.toml`.
        candidates: Precisions to choose from, as `["w4a8", "w8a8"]`; the target's own if
            `None`.
        keep: fnmatch pattern on layer names to a precision, as `{"classifier": "w8a8"}`.
        exclude: fnmatch patterns of layers that stay float, even where `keep` matches too.
        ties: Each entry an fnmatch pattern, or several, whose layers share a precision, as
            `["encoder.layer.0.*", ("stem", "head")]`. To tie groups for one plan only, give
            `ties` to `solve`.
        products: Whether to quantize products of two activations too, those of attention
            included: both operands at the activation half of a candidate, a precision like `a8`.
            Fused attention is then taken apart into product, scale, mask, softmax and product,
            unless `keep` or `exclude` leaves both products in float.

    Returns:
        The prepared graph, which computes exactly what `graph` does; where attention was taken
        apart it agrees to rounding.

    Raises:
        TargetError: If the target is unknown or its packages are missing.
        PrecisionError: If `candidates` is no list, the target cannot run a precision, or layers
            that must share one have none in common.
        PatternError: If `exclude` is no list, a pattern matches no layer, with the closest names,
            or a tie one only.
    """
    found = get_target(target)
    wanted = read_candidates(candidates)
    pins = {pattern: Precision.parse(entry) for pattern, entry in (keep or {}).items()}
    return insert_quantizers(
        graph,
        found.rules,
        candidates=wanted,
        keep=pins,
        exclude=read_exclude(exclude),
        ties=ties,
        products=products,
    )


def cost(
    graph: fx.GraphModule,
    target: str | Path | Target | None = None,
    *,
    metric: str | Iterable[str] | None = None,
    progress: bool = True,
) -> CostTable:
    """Count what each group costs at each of its candidates; measure it, where that is asked for.

    Metrics: `weights` (bytes, scales included), `weight_bits` (bits of the codes alone),
    `bops` (bit operations for one sample), `macs` (for one sample), all exact integers; and those
    that a target file has figures for, as `cycles`, for one sample. Matrix products that stay
    float, such as fused attention, enter all but the first two as a fixed part. Sample sizes are
    those of the batch the model was traced with.

    `metric="latency"` adds milliseconds, measured in the target's runtime on this machine, for one
    sample of the traced sizes; for two where the trace, which has two, fixed the batch size. They
    are of CPU time where torch computes in one thread, else of the time that passes.
    `fxmpq.costs.latency` says what is modelled. It takes minutes the first time; what was measured
    is kept in `fxmpq.costs.latency.store.cache_folder()`. `file_size` adds the bytes of all files
    that `convert` writes, predicted from those of the float model and of each candidate's uniform
    plan, which are written to a temporary folder. `activation_memory` adds the most bytes
    of activations that are alive at once, and `energy` an estimate in picojoules, both for one
    sample and without running anything.

    Args:
        graph: From `prepare` or later.
        target: The target it was prepared for, whose own metrics are counted too; by default the
            one of the name that the graph remembers.
        metric: Further metrics, keys of `FURTHER`, one or several; none by default.
        progress: Whether to show progress bars while measuring.

    Returns:
        The table, with the float model's totals as denominators for relative budgets.

    Raises:
        TargetError: If the target is another one, or this machine lacks what measuring takes.
        FxmpqError: If the graph has no groups, a metric no figure for a candidate, or the target
            not the further metric.

    Examples:
        >>> import torch, fxmpq
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 4))
        >>> graph = fxmpq.trace(net, torch.randn(2, 8))
        >>> table = cost(fxmpq.prepare(graph, "reference", candidates=["w4a8", "w8a8"]))
        >>> table.cost("weight_bits", "0", "w4a8"), table.float_total["weight_bits"]
        (128, 1024)
    """
    state = require_groups(graph, stage="prepared")
    wanted = further_metrics(metric)
    found = get_target(target) if target is not None else TARGETS.get(str(state.target))
    if found is not None and found.name != state.target:
        raise TargetError(
            f"asked for the costs on {found.name!r}, but the graph was prepared for "
            f"{state.target!r}; prepare it for {found.name!r}"
        )
    table = count(graph, {} if found is None else found.metrics)
    if not wanted:
        return table
    if found is None:
        raise TargetError(
            f"the graph was prepared for {state.target!r}, which a file describes; name the file, "
            f"as fxmpq.cost(graph, '{state.target}.toml', metric={wanted[0]!r})"
        )
    names = further_of(found, wanted)
    if any(FURTHER[name].is_measured for name in names):
        # The graph may have been prepared on another machine.
        found = get_target(found)
    write = found.write or found.convert
    subject = Subject(graph, found.rules, write, runtime_of(found), progress=progress)
    return with_further(table, names, subject)


def further_of(target: Target, metrics: Iterable[str]) -> tuple[str, ...]:
    """Which metrics are further ones, and none of the target's own.

    Args:
        target: Which runs or describes the models.
        metrics: Names of any metrics.

    Raises:
        FxmpqError: If the target does not have one of them.
    """
    names = [name for name in metrics if name in FURTHER and name not in target.metrics]
    check_further(names, target.name, runtime_of(target))
    return tuple(dict.fromkeys(names))


def runtime_of(target: Target) -> Runtime | None:
    """What runs a target's models on this machine; `None` where they do not run as elsewhere."""
    if target.latency is None:
        return None

    def load(graph: fx.GraphModule) -> Run:
        return target.convert(graph, None).run

    return Runtime(target.name, target.load or load, target.latency, target.conditions or dict)


def apply(graph: fx.GraphModule, plan: Plan | Mapping[str, str]) -> fx.GraphModule:
    """Set every group of a calibrated graph to the precision a plan chose.

    Args:
        graph: From `calibrate`; copied, not changed.
        plan: From `solve`, or precision names per group.

    Returns:
        A graph that simulates the plan, ready for `convert`.

    Raises:
        PlanError: If the plan was made for another model or names other groups.
    """
    state = require(graph, stage="calibrated")
    return with_choices(graph, choices_of(plan, state.fingerprint))
