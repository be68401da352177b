"""Bias correction: the mean that quantization adds to each layer's output is taken away."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import fx

from fxmpq.graph.batches import Batch
from fxmpq.graph.state import Refinement
from fxmpq.refinement.channel_statistics import channel_statistics
from fxmpq.refinement.units import Units
from fxmpq.refinement.views import LayerView
from fxmpq.refinement.walk import Walk


def bias_correction(
    graph: fx.GraphModule, batches: Sequence[Batch], *, units: Units
) -> list[Refinement]:
    """Make the mean of every layer's output per channel what it is in the float model.

    In graph order, each layer's bias loses `E[q - y]`, the mean over all samples and positions
    by which its output exceeds the float one, given its real input: earlier layers and the input
    itself quantized, earlier biases corrected already (empirical bias correction, Nagel et al.
    2019, arXiv:1906.04721, section 4.2.1, here sequential). `calibrate` corrects with float inputs;
    what is added here is the error of the inputs. Layers whose bias is computed, embeddings and
    float layers stay as they are.

    Every layer's error falls, but the model's need not: rounding also takes spread from each layer,
    and with the means held up the spread dies away over many layers of few bits.
    `norm_reestimation` gives both back at the same cost; methods that fit rounding to outputs, as
    `gptq`, leave no mean to correct.

    Cost: two float and two quantized passes.

    Args:
        graph: Planned; changed in place.
        batches: What the model takes.
        units: Shows progress and keeps finished layers.

    Returns:
        What it did to each layer. The error never grows: its mean part is gone.
    """
    found: list[Refinement] = []
    for view in units.track(Walk(graph, batches).layers(), "correcting biases"):
        if view.correction is not None:
            before, after = units.unit(
                f"bias_correction {view.node.name}",
                graph,
                view.modules,
                partial(correct_bias, view),
            )
            found.append(Refinement("bias_correction", view.layer.name, before, after))
    return found


def correct_bias(view: LayerView) -> tuple[float, float]:
    """Make the mean of one layer's output per channel what it is in the float model.

    Args:
        view: A layer whose bias can be corrected; its shift is changed.

    Returns:
        Relative squared error of its output before and after.
    """
    statistics = channel_statistics(view)
    shift = statistics.error_mean.float()
    before = view.quantized_bias
    view.set_bias(-shift if before is None else before - shift)
    return statistics.error, statistics.error_after(torch.ones_like(statistics.mean))
