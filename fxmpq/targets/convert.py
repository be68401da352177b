"""Convert: from a planned graph to something that runs on the target."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxmpq.errors import PlanError, TargetError
from fxmpq.graph.batches import Batch, materialize
from fxmpq.graph.run import run_batch
from fxmpq.graph.state import require
from fxmpq.targets.registry import get_target
from fxmpq.targets.target import Converted, Target, agreement_db

REQUIRED_AGREEMENT_DB = 25.0
"""Below this a conversion disagrees by more than rounding can explain."""


def convert(
    graph: fx.GraphModule,
    target: str | Target | None = None,
    output: str | Path | None = None,
    *,
    verify: Iterable[Batch] | bool = True,
) -> Converted:
    """Rewrite a planned graph for its target, and check it against the simulation.

    Args:
        graph: From `apply`, `quantize` or `MixedPrecisionCallback.graph_module`.
        target: The target it was prepared for, by default; another one is refused, since its
            groups and quantizers differ.
        output: Folder to write files to, made if missing; `None` writes nothing.
        verify: Batches to check on; `True` checks on the batch kept from tracing, `False`
            does not check.

    Returns:
        The runnable model, its files, what each layer runs, and its agreement in dB.

    Raises:
        PlanError: If the graph has no chosen precisions yet.
        TargetError: If the target is another, misses a package, or disagrees with the
            simulation by more than rounding.
    """
    state = require(graph, stage="calibrated")
    assert state.target is not None
    found = get_target(state.target if target is None else target)
    if found.name != state.target:
        raise TargetError(
            f"asked to convert for {found.name!r}, but the graph was prepared for "
            f"{state.target!r}; prepare, calibrate and solve for {found.name!r}"
        )
    if not state.choices:
        raise PlanError("the graph has no chosen precisions; call fxmpq.apply(graph, plan) first")
    converted = found.convert(graph, None if output is None else Path(output))
    if verify is False:
        return converted
    batches = [_example_batch(graph)] if verify is True else materialize(verify, "verification")
    agreement = min(_agreement(graph, converted, batch) for batch in batches)
    if not agreement >= REQUIRED_AGREEMENT_DB:
        raise TargetError(
            f"the converted model disagrees with the simulation: {agreement:.1f} dB SQNR on the "
            f"checked batches, where rounding alone stays above {REQUIRED_AGREEMENT_DB:.0f} dB"
        )
    return replace(converted, sqnr_db=agreement)


def _agreement(graph: fx.GraphModule, converted: Converted, batch: Batch) -> float:
    expected = [leaf for leaf in run_batch(graph, batch) if isinstance(leaf, Tensor)]
    return agreement_db(expected, [leaf.cpu() for leaf in converted.run(batch)])


def _example_batch(graph: fx.GraphModule) -> Batch:
    state = require(graph, stage="traced")
    call: tuple[tuple[object, ...], dict[str, object]]
    call = pytree.tree_unflatten(list(state.example), state.call_spec)
    args, kwargs = call
    return kwargs or args
