"""Layerwise rounding: what GPTQ and AdaRound share, as both work on a layer's moments alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor, fx

from fxmpq.formats import NumberFormat
from fxmpq.granularity import PerChannel
from fxmpq.graph.batches import Batch
from fxmpq.graph.state import Refinement
from fxmpq.quantizers.modules import WeightQuantizer
from fxmpq.quantizers.second_order import Grid, Quadratic, best_codes
from fxmpq.refinement.bias_correction import correct_bias
from fxmpq.refinement.moments import Moments, layer_moments
from fxmpq.refinement.units import Units
from fxmpq.refinement.views import LayerView
from fxmpq.refinement.walk import Walk


@dataclass(frozen=True)
class RoundingProblem:
    """A layer's codes to choose: all in `float64`, `[groups, channels, weights]`.

    Args:
        form: Squared error of the layer's output from its quantized input against its float
            output, in the change of its weight; with a bias that follows, if the layer has one
            to correct.
        weight: The float weight.
        codes: Its present codes: stored ones, else the nearest.
        grid: What codes stand for.
        number_format: Of the codes.
        has_channel_scales: Whether each channel has one scale, which may be any number.
    """

    form: Quadratic
    weight: Tensor
    codes: Tensor
    grid: Grid
    number_format: NumberFormat
    has_channel_scales: bool


Rounding = Callable[[RoundingProblem], Iterable[Tensor]]
"""Proposes codes, of which each channel takes the best."""

Fit = Callable[[RoundingProblem], tuple[Tensor, Tensor]]
"""From the best codes on, finds codes and scales `[groups, channels, 1]` that lose no more."""


def round_layers(
    method: str,
    graph: fx.GraphModule,
    batches: Sequence[Batch],
    units: Units,
    propose: Rounding,
    fit: Fit | None = None,
) -> list[Refinement]:
    """Round the weights of every layer in graph order, each on what earlier ones became.

    Each channel keeps the best of its present codes and those proposed, so its error never
    grows; the bias then takes what the weight leaves of the mean error. A weight that several
    layers share is rounded for the first of them, and the others get the bias that goes with it.
    Embeddings and weights of float format stay as they are.

    Args:
        method: Name of the method, for the report.
        graph: Planned; changed in place.
        batches: What the model takes.
        units: Shows progress and keeps finished layers.
        propose: Finds codes.
        fit: Improves on the best of them, where each channel has a scale; `None` leaves the scales.

    Returns:
        Relative squared error of each layer's output before and after.
    """
    found: list[Refinement] = []
    for view in units.track(Walk(graph, batches).layers(), method):
        if not _is_roundable(view) or not (view.is_first or view.correction is not None):
            continue
        compute = partial(correct_bias, view)
        if view.is_first:
            compute = partial(_round, view, propose, fit)
        before, after = units.unit(f"{method} {view.layer.name}", graph, view.modules, compute)
        found.append(Refinement(method, view.layer.name, before, after))
    return found


def _is_roundable(view: LayerView) -> bool:
    """Whether the layer's error is a form in its codes."""
    number_format = view.number_format
    is_grid = number_format is not None and number_format.is_integer
    return is_grid and view.operator.kind in ("conv", "linear")


def _round(view: LayerView, propose: Rounding, fit: Fit | None) -> tuple[float, float]:
    quantizer, number_format = view.quantizer, view.number_format
    assert quantizer is not None and number_format is not None
    moments = layer_moments(view)
    problem = _problem(view, moments, quantizer, number_format)
    weight, scale = problem.weight, problem.grid.scale
    before = moments.error(problem.codes * scale - weight, _present_shift(view, moments))
    codes = best_codes(problem.form, weight, problem.codes, propose(problem), problem.grid)
    if fit is not None and problem.has_channel_scales:
        codes, scale = fit(replace(problem, codes=codes))
        # What is stored is rounded to float32, and that is what counts.
        quantizer.set_scale(number_format, scale.reshape(-1).float())
        scale = moments.rows(
            quantizer.spread_scale(view.weight, number_format).expand_as(view.weight)
        )
    quantizer.set_codes(number_format, codes.reshape(view.weight.shape))
    change = codes * scale - weight
    if view.correction is None:
        return before, moments.error(change, _present_shift(view, moments))
    bias = moments.shift(change).reshape(-1).to(view.weight.dtype)
    view.set_bias(bias if view.float_bias is None else view.float_bias + bias)
    return before, moments.error(change, _present_shift(view, moments))


def _problem(
    view: LayerView, moments: Moments, quantizer: WeightQuantizer, number_format: NumberFormat
) -> RoundingProblem:
    weight = view.weight
    scale = quantizer.spread_scale(weight, number_format).expand_as(weight)
    return RoundingProblem(
        form=moments.quadratic(free_bias=view.correction is not None),
        weight=moments.rows(weight),
        codes=moments.rows(quantizer.codes(weight, number_format)),
        grid=Grid(moments.rows(scale), number_format.qmin, number_format.qmax),
        number_format=number_format,
        has_channel_scales=isinstance(number_format.granularity, PerChannel),
    )


def _present_shift(view: LayerView, moments: Moments) -> Tensor:
    """What the layer's bias adds to the float one now, shape `[groups, channels]`."""
    now, before = view.quantized_bias, view.float_bias
    if now is None:
        return moments.residual.new_zeros(moments.residual.shape)
    shift = now if before is None else now - before
    return shift.double().reshape(moments.residual.shape)
