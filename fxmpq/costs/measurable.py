"""Graphs as sizes and times are found on: with ranges, and free to be float everywhere."""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from fxmpq.calibration.calibrate import calibrate
from fxmpq.formats import Precision
from fxmpq.graph.batches import example_batch
from fxmpq.graph.state import copy_graph, state_of, with_state


def calibrated_on_example(
    graph: fx.GraphModule, *, bias_correction: bool = False
) -> fx.GraphModule:
    """Find ranges on the example alone: they do not change how fast a model runs, nor its size.

    Args:
        graph: From `prepare`; not changed.
        bias_correction: Whether quantized layers get biases, which those without one may lack.
    """
    return calibrate(
        graph,
        [example_batch(graph)],
        ranges="minmax",
        weight_scales="minmax",
        bias_correction=bias_correction,
        progress=False,
    )


def with_float(calibrated: fx.GraphModule) -> fx.GraphModule:
    """Copy a calibrated graph with float among the candidates of every group.

    Args:
        calibrated: From `calibrate`; not changed.
    """
    state = state_of(calibrated)
    groups = tuple(
        replace(group, candidates=tuple(dict.fromkeys([*group.candidates, Precision()])))
        for group in state.groups
    )
    return with_state(copy_graph(calibrated), replace(state, groups=groups))
