"""Convert: from a planned graph to something that runs on the target."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from torch import Tensor, fx

from fxmpq.errors import PlanError, TargetError
from fxmpq.graph.batches import Batch, example_batch, materialize
from fxmpq.graph.run import run_batch
from fxmpq.graph.state import require_groups
from fxmpq.targets.divergence import REQUIRED_AGREEMENT_DB, check_layers
from fxmpq.targets.registry import TARGETS, get_target
from fxmpq.targets.target import Converted, Target, agreement_db


def convert(
    graph: fx.GraphModule,
    target: str | Path | Target | None = None,
    output: str | Path | None = None,
    *,
    verify: Iterable[Batch] | bool = True,
) -> Converted:
    """Rewrite a planned graph for its target, and check it against the simulation.

    The check passes batches through both. Outputs that agree to 35 dB SQNR pass. Where they do
    not, each layer is compared on the inputs it got from the target: if all of them agree to
    35 dB there, the difference is rounding that later layers amplified, as it happens in deep
    networks with weights of 2 bits, and the conversion passes with the SQNR that it has;
    otherwise the first layer that does not is named. It costs a pass of each a batch, and one
    more of each for a batch that differs.

    Args:
        graph: From `apply`, `quantize` or `MixedPrecisionCallback.graph_module`.
        target: The target it was prepared for, by default; one that a file describes has to be
            given. Another one is refused, since its groups and quantizers differ.
        output: Folder to write files to, made if missing; `None` writes nothing.
        verify: Batches to check on, a few that the model was calibrated on, say; `True` checks on
            the batch kept from tracing, `False` does not check.

    Returns:
        The runnable model, its files, what each layer runs, and its agreement in dB: that of the
        worst batch.

    Raises:
        PlanError: If the graph has no chosen precisions yet.
        FxmpqError: If it has nothing to quantize.
        TargetError: If the target is another, misses a package, or disagrees with the
            simulation by more than rounding, naming the layer that diverges first.

    Examples:
        >>> import torch, fxmpq
        >>> x = torch.randn(4, 8)
        >>> graph = fxmpq.prepare(fxmpq.trace(torch.nn.Linear(8, 4), x), "reference")
        >>> graph = fxmpq.calibrate(graph, [x], progress=False)
        >>> planned = fxmpq.apply(graph, fxmpq.cost(graph).uniform("w4a8"))
        >>> made = convert(planned, verify=[x])
        >>> made.sqnr_db, made.layers[0].asked
        (inf, 'w4a8')
    """
    state = require_groups(graph, stage="calibrated")
    assert state.target is not None
    if target is None and state.target not in TARGETS:
        raise TargetError(
            f"the graph was prepared for {state.target!r}, which a file describes; name the file, "
            f"as fxmpq.convert(graph, '{state.target}.toml')"
        )
    found = get_target(state.target if target is None else target)
    if found.name != state.target:
        raise TargetError(
            f"asked to convert for {found.name!r}, but the graph was prepared for "
            f"{state.target!r}; prepare, calibrate and solve for {found.name!r}"
        )
    if not state.choices:
        raise PlanError("the graph has no chosen precisions; call fxmpq.apply(graph, plan) first")
    converted = found.convert(graph, None if output is None else Path(output))
    converted = replace(converted, target=found.name, runtime=converted.target)
    if verify is False:
        return converted
    batches = [example_batch(graph)] if verify is True else materialize(verify, "verification")
    agreements = [_agreement(graph, converted, batch) for batch in batches]
    for agreement, batch in zip(agreements, batches, strict=True):
        if not agreement >= REQUIRED_AGREEMENT_DB:
            check_layers(graph, converted, batch, agreement)
    return replace(converted, sqnr_db=min(agreements))


def _agreement(graph: fx.GraphModule, converted: Converted, batch: Batch) -> float:
    expected = [leaf for leaf in run_batch(graph, batch) if isinstance(leaf, Tensor)]
    return agreement_db(expected, [leaf.cpu() for leaf in converted.run(batch)])
