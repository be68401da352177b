"""The steps that take a target or a plan by name, in the order a user walks them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import fx

from fxmpq.formats import Precision
from fxmpq.graph.prepare import insert_quantizers
from fxmpq.graph.state import require
from fxmpq.graph.switch import with_choices
from fxmpq.solver.plan import Plan, choices_of
from fxmpq.targets.registry import get_target
from fxmpq.targets.target import Target


def prepare(
    graph: fx.GraphModule,
    target: str | Target,
    *,
    candidates: Sequence[str | Precision] | None = None,
    keep: Mapping[str, str | Precision] | None = None,
    exclude: Sequence[str] = (),
) -> fx.GraphModule:
    """Group a graph's layers by a target's fusion rules and insert quantizers, all off.

    Args:
        graph: From `trace`; copied, not changed.
        target: A target's name, as `reference` or `onnxruntime`.
        candidates: Precisions to choose from, as `["w4a8", "w8a8"]`; the target's own if
            `None`.
        keep: fnmatch pattern on layer names to a precision, as `{"classifier": "w8a8"}`.
        exclude: fnmatch patterns of layers that stay float, even where `keep` matches too.

    Returns:
        The prepared graph, which computes exactly what `graph` does.

    Raises:
        TargetError: If the target is unknown or its packages are missing.
        PrecisionError: If the target cannot run a precision.
        PatternError: If a pattern matches no layer, with the closest names.
    """
    found = get_target(target)
    wanted = None if candidates is None else [Precision.parse(entry) for entry in candidates]
    pins = {pattern: Precision.parse(entry) for pattern, entry in (keep or {}).items()}
    return insert_quantizers(graph, found.rules, candidates=wanted, keep=pins, exclude=exclude)


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
