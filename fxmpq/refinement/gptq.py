"""GPTQ: second-order rounding of each layer, polished one code at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, fx

from fxmpq.errors import FxmpqError
from fxmpq.graph.batches import Batch
from fxmpq.graph.state import Refinement
from fxmpq.quantizers.second_order import Grid, descend_codes, feedback_codes, fitted_scale
from fxmpq.refinement.rounding import RoundingProblem, round_layers
from fxmpq.refinement.units import Units


def gptq(
    graph: fx.GraphModule,
    batches: Sequence[Batch],
    *,
    units: Units,
    damping: float = 0.01,
    sweeps: int = 4,
    fits: int = 1,
) -> list[Refinement]:
    """Round each layer's weights so that its output, not its weight, stays near the float one.

    For a layer with float input `x` and quantized input `u`, it lowers

        E || (W x + b) - (W_q u + b_q) ||^2

    over the codes of `W_q` and over `b_q`, with the scales as they are. This is a quadratic form
    in the codes, known from second moments of `u` and of the error that `u` brings, gathered in
    one pass over the layer's inputs. Columns are rounded one after another, the later ones making
    up for each rounding (OBQ, arXiv:2208.11580; GPTQ, Frantar et al. 2022, arXiv:2210.17323), here
    from the weight that is best on the quantized input, so that a layer also undoes what
    quantization before it did; then codes move one at a time for as long as that helps. The best
    bias is that of the float model plus the mean of what is left.

    Layers come in graph order, each on what earlier ones became. Weights of float format and
    embeddings stay as they are. Cost: one float and one quantized pass, the moments (about as much
    as seven passes for 3 x 3 convolutions), and a time that does not depend on the number of
    samples.

    Args:
        graph: With chosen precisions; codes and bias shifts are changed.
        batches: What the model takes.
        units: Shows progress and keeps finished layers.
        damping: What is added to the diagonal of the second moments before they are inverted,
            in parts of their mean diagonal.
        sweeps: How often to go over all codes at most once they are rounded; 0 is plain GPTQ.
        fits: How often to fit the scales of channels to their codes, the codes following each time;
            0 leaves the scales as they are. Scales of tensors and blocks stay.

    Returns:
        Relative squared error of each layer's output before and after; `after` is never more.

    Raises:
        FxmpqError: If `damping` is no finite number above 0 or too small to invert by, or `sweeps`
            is negative.
    """
    if not 0 < damping < math.inf:
        raise FxmpqError(f"damping must be a finite number above 0, such as 0.01; found {damping}")
    for name, value in (("sweeps", sweeps), ("fits", fits)):
        if value < 0:
            raise FxmpqError(f"{name} must be at least 0; found {value}")

    def propose(problem: RoundingProblem) -> list[Tensor]:
        form, weight, grid = problem.form, problem.weight, problem.grid
        try:
            codes = feedback_codes(form, weight, grid, damping=damping)
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]  # torch's own
            raise FxmpqError(
                f"damping={damping} is too little to invert the second moments of a layer's "
                "input, as where inputs depend on one another; 0.01 is enough"
            ) from error
        return [codes, descend_codes(form, weight, codes, grid, sweeps=sweeps)]

    def fit(problem: RoundingProblem) -> tuple[Tensor, Tensor]:
        return _fitted(problem, fits, sweeps)

    return round_layers("gptq", graph, batches, units, propose, fit if fits else None)


def _fitted(problem: RoundingProblem, fits: int, sweeps: int) -> tuple[Tensor, Tensor]:
    """Fit each channel's scale to its codes and let the codes follow, in turns."""
    form, weight, grid = problem.form, problem.weight, problem.grid
    codes, scale = problem.codes, grid.scale[:, :, :1]
    for _ in range(fits):
        scale = fitted_scale(form, weight, codes, scale)
        codes = descend_codes(form, weight, codes, Grid(scale, grid.low, grid.high), sweeps=sweeps)
    return codes, fitted_scale(form, weight, codes, scale)
