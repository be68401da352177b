"""By what a calibrated graph is known again, as interrupted work does."""

from __future__ import annotations

from torch import fx

from fxmpq.graph.state import require
from fxmpq.journal import data_digest
from fxmpq.quantizers.modules import ActivationQuantizer, BiasCorrection


def calibration_identity(graph: fx.GraphModule) -> dict[str, object]:
    """What identifies a calibrated graph, as plain data: model, candidates, ranges and tensors.

    Precisions that are chosen, and biases that are rounded for them, do not count.

    Args:
        graph: From `calibrate` or a later step.

    Returns:
        Equal for graphs that compute the same at every candidate; JSON holds it.
    """
    state = require(graph, stage="calibrated")
    ranges = [
        module.ranges for module in graph.modules() if isinstance(module, ActivationQuantizer)
    ]
    rounded = {
        f"{name}.rounding"
        for name, module in graph.named_modules()
        if isinstance(module, BiasCorrection)
    }
    tensors = [tensor for name, tensor in graph.state_dict().items() if name not in rounded]
    return {
        "model": state.fingerprint,
        "candidates": {group.name: [str(c) for c in group.candidates] for group in state.groups},
        "ranges": data_digest([repr(ranges), *tensors]),
    }
