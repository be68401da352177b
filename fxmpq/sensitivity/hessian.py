"""HAWQ-V2: the mean curvature of each tensor times what rounding moves it by."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import fx

from fxmpq.errors import FxmpqError
from fxmpq.formats import NumberFormat, Precision
from fxmpq.graph.batches import materialize
from fxmpq.graph.state import Group, require
from fxmpq.quantizers.modules import ActivationQuantizer
from fxmpq.sensitivity.changes import weight_changes
from fxmpq.sensitivity.curvature import Curvature, Part
from fxmpq.sensitivity.sensitivity import Sensitivity
from fxmpq.sensitivity.weightless import check_all_have_weights
from fxmpq.training.loss import LossFunction, check_loss
from fxmpq.work import Work

_LOGGER = logging.getLogger(__name__)

_LEAST_DRAWS = 3
"""Draws of a block below which their standard error says little."""

Draw = Callable[[Sequence[Part], int], Sequence[float]]
Noise = Mapping[str, Mapping[NumberFormat, float]]


def hessian(
    graph: fx.GraphModule,
    batches: Iterable[Any],
    *,
    loss: LossFunction,
    probes: int = 8,
    tolerance: float = 0.3,
    activations: bool = True,
    together: bool = False,
    seed: int = 0,
    work: Work = Work(),
) -> Sensitivity:
    """Score every (group, precision) by curvature times squared rounding error.

    The score of group `g` at precision `w<b>a<c>` is, with `H` the Hessian of the loss,

        `Omega(g, b, c) = sum_{weights W of g} Tr(H_W) / N_W * ||Q_b(W) - W||^2`
                       `+ sum_{activations x of g} Tr(H_x) / N_x * E ||Q_c(x) - x||^2`,

    the second with traces and errors per sample, averaged over samples, and `N` the numbers of
    values (HAWQ-V2, Dong et al. 2019, arXiv:1911.03852; HAWQ-V3, Yao et al. 2020,
    arXiv:2011.10680). A weight that several layers or calls share counts once, with the
    curvature of all its calls. Half of Omega would be the loss increase if gradients were zero,
    curvature the same in all directions, and groups did not interact; it is published without
    the half and so serves as a score. Bias corrections do not enter.

    Traces come from Hutchinson's estimator, `E[z^T H z]` over random signs `z`, with
    Hessian-vector products by differentiating twice. Signs are drawn for one tensor at a time;
    `together=True` draws them for all weights at once and for all activations at once, as `z_l
    . (H z)_l` is unbiased for each tensor `l`. That costs the same for any number of layers, but
    each tensor then sees all others as noise: on a ResNet-20, 20 to 30 times the variance for
    a fifth of the cost. A tensor is drawn until the standard error of its mean is small.

    At a minimum no trace is negative, and with a convex loss and nothing but ReLUs between
    layers of their own weights none is anywhere. Elsewhere one can be (transformers far from a
    minimum); then, other than published, its magnitude counts, since a negative score would pay
    a solver for rounding, and zero let it round for free. A warning tells how many there are.

    Cost: per probe and batch a forward pass, its gradient, and a Hessian-vector product per
    tensor (two in all with `together`), each about two forward passes: 78 forward passes a
    probe for the 42 tensors of a ResNet-20, 15 with `together`; 3 probes do, as its ranking
    gained nothing from more. Needs labels, or what the loss reads; no training. Memory: one
    batch's second derivatives.

    Args:
        graph: A calibrated graph; not changed.
        batches: What `loss` takes. Each draws signs of its own, so that several small batches
            tell more than a large one.
        loss: `loss(model, batch)`, the mean over the batch's samples, twice differentiable.
        probes: Draws of signs at most.
        tolerance: Relative standard error of a tensor's mean trace at which it is drawn no more
            (`together`: of all weights' in quadrature, and all activations'), from 3 draws on.
            0 goes on for as long as draws differ.
        activations: Whether activations count.
        together: Whether the signs of all weights are drawn at once, and of all activations.
        seed: Of the signs; the same seed gives the same bits.
        work: Progress and journal; a probe over all batches is one unit.

    Returns:
        Sensitivity of unit `score`: a ranking, in units of the loss, that predicts nothing.

    Raises:
        FxmpqError: If an option is out of range, or the loss is no scalar, does not run the
            model, or has no second derivative, or one that is zero everywhere; or, without
            activations, if a group has nothing but products of activations to choose for.
        CalibrationError: If there are no batches, or a second derivative is not finite.

    Examples:
        >>> import fxmpq, torch
        >>> from fxmpq.training.loss import classification_loss
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2)).eval()
        >>> inputs, labels = torch.randn(8, 4), torch.tensor([0, 1] * 4)
        >>> prepared = fxmpq.prepare(fxmpq.trace(model, inputs), "reference")
        >>> graph = fxmpq.calibrate(prepared, [inputs])
        >>> found = hessian(graph, [(inputs, labels)], loss=classification_loss)
        >>> found.value("0", "w8a8") < found.value("0", "w2a8")
        True
    """
    state = require(graph, stage="calibrated")
    check_loss(loss)
    _check(probes, tolerance)
    if not activations:
        check_all_have_weights(state.groups, "hessian with activations=False")
    found = materialize(batches)
    curvature = Curvature(graph, loss, activations=activations)
    parts: list[Part] = [curvature.weights, curvature.activations]
    if not together:
        parts = [(name,) for part in parts for name in part]
    traces = _mean_traces(
        [part for part in parts if part],
        lambda drawn, number: curvature.draw(found, drawn, seed=seed, number=number),
        probes=probes,
        tolerance=tolerance,
        work=work,
    )
    noise = _weight_noise(graph, state.groups)
    if curvature.activations:
        numbers = work.unit("activation noise", lambda: curvature.noise(found))
        noise |= _activation_noise(graph, curvature.activations, numbers)
    values = {
        group.name: {str(c): _score(group, c, traces, noise) for c in group.candidates}
        for group in state.groups
    }
    return Sensitivity(values, method="hessian", fingerprint=state.fingerprint, unit="score")


def _check(probes: int, tolerance: float) -> None:
    if probes < 1:
        raise FxmpqError(f"probes is {probes}; at least one draw is needed")
    if not (math.isfinite(tolerance) and tolerance >= 0):
        raise FxmpqError(
            f"tolerance is {tolerance}; it is a relative standard error, 0 or more, as 0.3"
        )


def _mean_traces(
    parts: Sequence[Part], draw: Draw, *, probes: int, tolerance: float, work: Work
) -> dict[str, float]:
    """Mean of the draws per block, from as many as its part needs to settle."""
    draws: dict[str, list[float]] = {name: [] for part in parts for name in part}
    for number in work.track(range(probes), "measuring curvature"):
        drawn = [part for part in parts if not _has_settled([draws[n] for n in part], tolerance)]
        if not drawn:
            break
        numbers = work.unit(f"probe {number}", functools.partial(draw, drawn, number))
        for name, value in zip((n for part in drawn for n in part), numbers, strict=True):
            draws[name].append(value)
    if draws and not any(any(values) for values in draws.values()):
        raise FxmpqError(
            "the loss has a second derivative of zero everywhere, so it tells no layer from "
            "another; take a smooth loss, such as torch.nn.functional.cross_entropy or "
            "mse_loss, or a method without second derivatives, as 'projected'"
        )
    _warn_of_negative(list(draws.values()))
    return {name: abs(float(np.mean(values))) for name, values in draws.items()}


def _warn_of_negative(draws: Sequence[Sequence[float]]) -> None:
    """Say how many traces lie three standard errors or more below zero."""
    settled = [np.asarray(values) for values in draws if len(values) >= _LEAST_DRAWS]
    negative = sum(
        bool(values.mean() < -3 * values.std(ddof=1) / math.sqrt(len(values))) for values in settled
    )
    if negative:
        _LOGGER.warning(
            "%d of %d tensors have a negative Hessian trace, so the model is at no minimum of "
            "this loss on these batches; their magnitudes were taken. Check the loss and the "
            "labels, or take a method that needs neither, as 'projected'",
            negative,
            len(draws),
        )


def _has_settled(draws: Sequence[Sequence[float]], tolerance: float) -> bool:
    """Whether a part's mean traces are known to `tolerance`, in quadrature over its blocks."""
    table = np.asarray(draws)
    count = table.shape[1]
    if count < _LEAST_DRAWS:
        return False
    errors = table.std(axis=1, ddof=1) / math.sqrt(count)
    return float(np.linalg.norm(errors)) <= tolerance * float(np.linalg.norm(table.mean(axis=1)))


def _weight_noise(
    graph: fx.GraphModule, groups: Sequence[Group]
) -> dict[str, dict[NumberFormat, float]]:
    """`||Q_b(W) - W||^2` per weight quantizer and format."""
    noise: dict[str, dict[NumberFormat, float]] = {}
    for group in groups:
        for layer in group.layers:
            if layer.weight_quantizer is None or layer.weight_quantizer in noise:
                continue
            changes = weight_changes(graph, layer)
            powers = changes.weights.flatten(1).double().square().sum(1)
            noise[layer.weight_quantizer] = dict(zip(changes.formats, powers.tolist(), strict=True))
    return noise


def _activation_noise(
    graph: fx.GraphModule, names: Sequence[str], numbers: Sequence[float]
) -> dict[str, dict[NumberFormat, float]]:
    """`E ||Q_c(x) - x||^2` per activation quantizer and format."""
    left = iter(numbers)
    noise: dict[str, dict[NumberFormat, float]] = {}
    for name in names:
        quantizer = graph.get_submodule(name)
        assert isinstance(quantizer, ActivationQuantizer)
        noise[name] = {number_format: next(left) for number_format in quantizer.formats}
    return noise


def _score(group: Group, precision: Precision, traces: Mapping[str, float], noise: Noise) -> float:
    """Omega of one group at one precision."""
    weights = dict.fromkeys(layer.weight_quantizer for layer in group.layers)
    rounded: list[tuple[str, NumberFormat]] = []
    if precision.weight is not None:
        rounded += [(name, precision.weight) for name in weights if name is not None]
    if precision.activation is not None:
        rounded += [(name, precision.activation) for name in group.activation_quantizers]
    # Without `activations=True` these have no trace.
    return sum((traces[name] * noise[name][f] for name, f in rounded if name in traces), 0.0)
