"""Layerwise rounding: what GPTQ and AdaRound share, as both work on a layer's moments alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor, fx

from fxmpq.formats import NumberFormat
from fxmpq.graph.batches import Batch
from fxmpq.graph.state import Refinement
from fxmpq.quantizers.modules import WeightQuantizer
from fxmpq.quantizers.second_order import Grid, Quadratic, best_codes
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
    """

    form: Quadratic
    weight: Tensor
    codes: Tensor
    grid: Grid
    number_format: NumberFormat


Rounding = Callable[[RoundingProblem], Iterable[Tensor]]
"""Proposes codes, of which each channel takes the best."""


def round_layers(
    method: str, graph: fx.GraphModule, batches: Sequence[Batch], units: Units, propose: Rounding
) -> list[Refinement]:
    """Round the weights of every layer in graph order, each on what earlier ones became.

    Each channel keeps the best of its present codes and those proposed, so its error never
    grows; the bias then takes what the weight leaves of the mean error. A weight that several
    layers share is rounded for the first of them, and embeddings and weights of float format
    stay as they are.

    Args:
        method: Name of the method, for the report.
        graph: Planned; changed in place.
        batches: What the model takes.
        units: Shows progress and keeps finished layers.
        propose: Finds codes.

    Returns:
        Relative squared error of each layer's output before and after, from its moments.
    """
    found: list[Refinement] = []
    for view in units.track(Walk(graph, batches).layers(), method):
        if not _is_roundable(view):
            continue

        def compute(view: LayerView = view) -> list[float]:
            return _round(view, propose)

        before, after = units.unit(f"{method} {view.layer.name}", graph, view.modules, compute)
        found.append(Refinement(method, view.layer.name, before, after))
    return found


def _is_roundable(view: LayerView) -> bool:
    """Whether the layer's error is a form in its codes, and nobody has rounded them before it."""
    number_format = view.number_format
    is_grid = number_format is not None and number_format.is_integer
    return is_grid and view.is_first and view.operator.kind in ("conv", "linear")


def _round(view: LayerView, propose: Rounding) -> list[float]:
    quantizer, number_format = view.quantizer, view.number_format
    assert quantizer is not None and number_format is not None
    moments = layer_moments(view)
    problem = _problem(view, moments, quantizer, number_format)
    weight, grid = problem.weight, problem.grid
    before = moments.error(problem.codes * grid.scale - weight, _present_shift(view, moments))
    codes = best_codes(problem.form, weight, problem.codes, propose(problem), grid)
    quantizer.set_codes(number_format, codes.reshape(view.weight.shape))
    change = codes * grid.scale - weight
    if view.correction is None:
        return [before, moments.error(change, _present_shift(view, moments))]
    bias = moments.shift(change).reshape(-1).to(view.weight.dtype)
    view.set_bias(bias if view.float_bias is None else view.float_bias + bias)
    return [before, moments.error(change, _present_shift(view, moments))]


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
    )


def _present_shift(view: LayerView, moments: Moments) -> Tensor:
    """What the layer's bias adds to the float one now, shape `[groups, channels]`."""
    now, before = view.quantized_bias, view.float_bias
    if now is None:
        return moments.residual.new_zeros(moments.residual.shape)
    shift = now if before is None else now - before
    return shift.double().reshape(moments.residual.shape)
