"""Norm re-estimation: each channel of a layer's output gets back its mean and its spread."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, fx

from fxmpq.errors import FxmpqError
from fxmpq.formats import NumberFormat, ScaleKind
from fxmpq.granularity import PerTensor
from fxmpq.graph.batches import Batch
from fxmpq.graph.state import Refinement
from fxmpq.quantizers.modules import WeightQuantizer
from fxmpq.refinement.channel_statistics import ChannelStatistics, channel_statistics
from fxmpq.refinement.units import Units
from fxmpq.refinement.views import LayerView
from fxmpq.refinement.walk import Walk

MATCHES = ("regression", "deviation")
_SMALLEST_FACTOR, _LARGEST_FACTOR = 0.25, 4.0
_DEAD = 1e-8


def norm_reestimation(
    graph: fx.GraphModule, batches: Sequence[Batch], *, units: Units, match: str = "regression"
) -> list[Refinement]:
    """Re-estimate a norm behind every quantized layer and fold it into scales and bias.

    In graph order, with `q` a layer's quantized output on its real input (earlier layers
    quantized and re-estimated already) and `y` the float one, each channel becomes
    `f q + E[y] - f E[q]`. The factor multiplies the channel's weight scale and its bias; the
    integer codes stay what they are. Two factors are known:

    - `regression`: `f = cov(q, y) / var(q)`, which leaves the least squared error of all;
    - `deviation`: `f = sqrt(var(y) / var(q))`, which gives the channel its float spread, noise
      included, as re-estimating a batch norm does (para-normalization, Hubara et al. 2020,
      arXiv:2006.10518).

    A factor stays within `[1/4, 4]`; a channel that hardly varies, in float or quantized, keeps its
    scale. So do weights with one scale per tensor or with scales of 8 bits, and further calls of a
    weight that an earlier layer has re-estimated: these get the float mean alone. Layers whose
    bias is computed, embeddings and float layers stay as they are.

    Cost: two float and two quantized passes.

    Args:
        graph: Planned; changed in place.
        batches: What the model takes.
        units: Shows progress and keeps finished layers.
        match: `regression` or `deviation`.

    Returns:
        What it did to each layer. With `regression` no layer's error grows.

    Raises:
        FxmpqError: If `match` is neither.
    """
    if match not in MATCHES:
        raise FxmpqError(f"no match {match!r}; a norm is re-estimated by {' or '.join(MATCHES)}")
    found: list[Refinement] = []
    for view in units.track(Walk(graph, batches).layers(), "re-estimating norms"):
        if view.correction is not None:
            before, after = units.unit(
                f"norm_reestimation {view.node.name}",
                graph,
                view.modules,
                partial(_reestimate, view, match),
            )
            found.append(Refinement("norm_reestimation", view.layer.name, before, after))
    return found


def has_channel_scales(number_format: NumberFormat) -> bool:
    """Whether each channel's scales can be multiplied by any factor: `float32`, not per tensor."""
    is_shared = isinstance(number_format.granularity, PerTensor)
    return not is_shared and number_format.scale_kind is ScaleKind.FLOAT32


def scale_channels(
    quantizer: WeightQuantizer, weight: Tensor, number_format: NumberFormat, factors: Tensor
) -> bool:
    """Multiply a weight's scales per channel and leave its codes as they are.

    Args:
        quantizer: Of the weight; changed in place.
        weight: The float weight.
        number_format: The candidate to scale.
        factors: Positive, shape `[channels]`.

    Returns:
        Whether it did; a scale that channels share (also those of the groups of a transposed
        convolution), or that cannot take every value, is left.
    """
    if not has_channel_scales(number_format) or len(factors) != weight.shape[quantizer.axis]:
        return False
    scale = quantizer.scale(number_format)
    quantizer.set_codes(number_format, quantizer.codes(weight, number_format))
    spread = factors.to(scale.dtype).reshape(-1, *[1] * (scale.dim() - 1))
    quantizer.set_scale(number_format, scale * spread)
    return True


def _reestimate(view: LayerView, match: str) -> tuple[float, float]:
    assert view.quantizer is not None and view.number_format is not None
    statistics = channel_statistics(view)
    factors = torch.ones_like(statistics.mean)
    bias = view.quantized_bias
    before = torch.zeros_like(factors) if bias is None else bias.double()
    if view.is_first:
        wanted = _factors(statistics, match)
        if scale_channels(view.quantizer, view.weight, view.number_format, wanted):
            factors = wanted
    # f q + E[y] - f E[q], where q holds the bias already.
    after = factors * (before - statistics.quantized_mean) + statistics.mean
    view.set_bias(after.float())
    return statistics.error, statistics.error_after(factors)


def _factors(statistics: ChannelStatistics, match: str) -> Tensor:
    """Factor per channel, shape `[channels]`, `float64`."""
    spread, quantized = statistics.variance, statistics.quantized_variance
    dead = _DEAD * (spread + statistics.mean.square())
    alive = (spread > dead) & (quantized > dead)
    safe = torch.where(alive, quantized, torch.ones_like(quantized))
    if match == "deviation":
        found = (spread / safe).sqrt()
    else:
        found = (spread + statistics.error_covariance) / safe
    found = found.clamp(_SMALLEST_FACTOR, _LARGEST_FACTOR)
    return torch.where(alive, found, torch.ones_like(found))
