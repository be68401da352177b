"""By what a calibrated graph is known again, as interrupted work does."""

from __future__ import annotations

from torch import fx

from fxmpq.graph.state import require
from fxmpq.journal import data_digest
from fxmpq.quantizers.modules import ActivationQuantizer


def calibration_identity(graph: fx.GraphModule) -> dict[str, object]:
    """What identifies a calibrated graph, as plain data: model, candidates, ranges and tensors.

    Args:
        graph: From `calibrate` or a later step.

    Returns:
        Equal for graphs that compute the same at every candidate; JSON holds it.
    """
    state = require(graph, stage="calibrated")
    ranges = [
        module.ranges for module in graph.modules() if isinstance(module, ActivationQuantizer)
    ]
    return {
        "model": state.fingerprint,
        "candidates": {group.name: [str(c) for c in group.candidates] for group in state.groups},
        "ranges": data_digest([repr(ranges), *graph.state_dict().values()]),
    }
