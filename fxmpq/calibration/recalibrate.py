"""Recalibrate: find every range, scale and shift again as they were found before."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from fxmpq.calibration.calibrate import calibrate
from fxmpq.graph.batches import Batch
from fxmpq.graph.state import require
from fxmpq.graph.switch import with_choices


def recalibrate(graph: fx.GraphModule, batches: Iterable[Batch]) -> fx.GraphModule:
    """Calibrate a graph again in the way it was calibrated before, as after its weights changed.

    Runs the float graph once over the data, every quantizer off, finds everything anew with the
    remembered rules and options, and switches each group to the precision it was at. What was
    refined (codes, scales, shifts, ranges) is gone; `GraphState.refinements` too.

    Args:
        graph: A calibrated graph, with a plan or without; copied, not changed.
        batches: What the model takes.

    Returns:
        The graph with new ranges, scales and shifts, and the same choices.

    Raises:
        FxmpqError: If it was never calibrated.
        CalibrationError: If there are no batches, or a weight or activation is NaN or infinite.

    Examples:
        >>> import torch, fxmpq
        >>> batches = [torch.randn(8, 4, generator=torch.Generator().manual_seed(0))]
        >>> graph = fxmpq.trace(torch.nn.Sequential(torch.nn.Linear(4, 2)), batches[0])
        >>> graph = fxmpq.prepare(graph, "reference")
        >>> graph = fxmpq.calibrate(graph, batches, ranges="sigma", k=3, progress=False)
        >>> planned = fxmpq.apply(graph, {"0": "w4a8"})
        >>> again = recalibrate(planned, batches)
        >>> torch.equal(again(batches[0]), planned(batches[0]))
        True
    """
    state = require(graph, stage="calibrated")
    found = state.calibration
    assert found is not None
    calibrated = calibrate(
        graph,
        batches,
        ranges=found.ranges,
        weight_scales=found.weight_scales,
        bias_correction=found.bias_correction,
        progress=False,
    )
    return with_choices(calibrated, state.choices) if state.choices else calibrated
