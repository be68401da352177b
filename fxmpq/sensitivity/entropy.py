"""Entropy: layers whose quantized weights use few codes can do with fewer bits (EAGL)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, fx

from fxmpq.errors import FxmpqError
from fxmpq.formats import NumberFormat
from fxmpq.granularity import PerTensor
from fxmpq.graph.attributes import get_tensor
from fxmpq.graph.batches import Batch
from fxmpq.graph.state import Group, Layer, require
from fxmpq.quantizers.codes import nearest_codes
from fxmpq.quantizers.modules import WeightQuantizer
from fxmpq.quantizers.weight_scale import mse_weight_scales
from fxmpq.sensitivity.sensitivity import Sensitivity
from fxmpq.sensitivity.weightless import check_all_have_weights
from fxmpq.work import Work

GAINS = ("difference", "entropy")
SCALES = ("tensor", "channel")
_COUNTED_AT_ONCE = 2**22


def entropy(
    graph: fx.GraphModule,
    batches: Sequence[Batch],
    *,
    gain: str = "difference",
    scales: str = "tensor",
    work: Work = Work(),
) -> Sensitivity:
    """Score groups by the entropy that their weights' codes lose with fewer bits.

    With `H_l(b)` the entropy in bits of the codes of layer `l`'s weight in format `b`
    (`code_entropy`) and `B` the widest of the group's candidates, the value of a precision with
    weights in format `b` is

        `sum_l H_l(B) - H_l(b)`     for `gain="difference"`,
        `sum_l H_l(B)` if `b < B`   for `gain="entropy"`,

    and 0 at all formats as wide as `B`; the sum runs over the group's distinct weights.
    `gain="entropy"` is EAGL's (Bablani et al. 2023, arXiv:2301.13330): a group stays at its high
    width or drops to its low one, and what it would lose is the entropy of its codes at the high
    one; it is defined for two widths. The difference serves any number of them. Both are per
    layer, not per weight: the cost of a group brings in its size. EAGL reads a network trained
    at the high width; on one that was only calibrated, all layers use about the same share of
    their codes, and the score tells them apart less well than a measurement at the output does.

    `scales="tensor"` is the published grid: one step for the whole weight, here the one of
    least squared error. `scales="channel"` takes the calibrated codes, pooled over channels;
    with a step of its own each channel fills its codes, which hides the differences between
    layers. How many values share a scale enters only there: on the published grid `w4b32` is
    `w4`. Codes of float formats count as the numbers they stand for: -0 is 0.

    Activation formats do not enter, and fp32 counts as the widest format: both have value
    0.

    Cost: no pass at all; one look at every weight per width. Needs no data (`batches` is
    ignored and may be empty), no labels and no training.

    Args:
        graph: A calibrated graph.
        batches: Not used; every method takes them.
        gain: `difference` or `entropy`.
        scales: `tensor` or `channel`.
        work: Shows progress.

    Returns:
        Sensitivity of unit `score`, without projections.

    Raises:
        FxmpqError: If there is no such `gain` or `scales`, a group has nothing but products of
            activations to choose for, or `gain="entropy"` meets a group with more than two
            weight widths.

    Examples:
        >>> import fxmpq
        >>> model = torch.nn.Linear(16, 1, bias=False).eval()
        >>> x = torch.randn(4, 16)
        >>> _ = model.weight.data.copy_(torch.arange(-8.0, 8.0)[None])  # each 4-bit code once
        >>> graph = fxmpq.prepare(fxmpq.trace(model, x), "reference", candidates=["w2a8", "w4a8"])
        >>> graph = fxmpq.calibrate(graph, [x], progress=False)
        >>> entropy(graph, [], gain="entropy").values
        {'weight': {'w2a8': 4.0, 'w4a8': 0.0}}
    """
    state = require(graph, stage="calibrated")
    _check_options(gain, scales)
    check_all_have_weights(state.groups, "'entropy'")
    if gain == "entropy":
        _check_two_widths(state.groups)
    values: dict[str, dict[str, float]] = {}
    for group in work.track(state.groups, "counting codes"):
        # From few bits to many, as candidates are.
        formats = dict.fromkeys(c.weight for c in group.candidates if c.weight is not None)
        held = {
            entry: sum(
                code_entropy(*_codes(graph, layer, entry, scales)) for layer in _distinct(group)
            )
            for entry in formats
        }
        widest = next(reversed(held), None)
        values[group.name] = {
            str(c): 0.0
            if widest is None or c.weight is None or c.weight.bits == widest.bits
            else held[widest] - (held[c.weight] if gain == "difference" else 0.0)
            for c in group.candidates
        }
    return Sensitivity(values, method="entropy", fingerprint=state.fingerprint, unit="score")


def code_entropy(codes: Tensor, qmin: int, qmax: int) -> float:
    """Entropy of integer codes, `H = -sum_k p_k log2 p_k` in bits.

    `p_k` is the share of codes equal to `k`; codes that do not occur add nothing.

    Args:
        codes: Integers of any shape, at least one.
        qmin: Smallest possible code.
        qmax: Largest possible code.

    Returns:
        Between 0 (all codes equal) and `log2(qmax - qmin + 1)` (all equally frequent).

    Raises:
        FxmpqError: If there are no codes, or one lies outside `[qmin, qmax]`.

    Examples:
        >>> code_entropy(torch.tensor([-2, -1, 0, 1]), -2, 1)
        2.0
    """
    if codes.numel() == 0:
        raise FxmpqError("the entropy of no codes is not defined")
    low, high = int(codes.min()), int(codes.max())
    if low < qmin or high > qmax:
        raise FxmpqError(f"codes lie in [{low}, {high}]; expected [{qmin}, {qmax}]")
    counts = torch.zeros(qmax - qmin + 1, dtype=torch.long, device=codes.device)
    for part in torch.split(codes.detach().flatten(), _COUNTED_AT_ONCE):
        counts += torch.bincount(part.long() - qmin, minlength=len(counts))
    shares = counts[counts > 0].double() / codes.numel()
    return float((shares * shares.reciprocal().log2()).sum())


def _codes(
    graph: fx.GraphModule, layer: Layer, number_format: NumberFormat, scales: str
) -> tuple[Tensor, int, int]:
    """A weight's codes and the smallest and largest there may be."""
    weight = get_tensor(graph, layer.weight).detach()
    if scales == "channel":
        assert layer.weight_quantizer is not None
        quantizer = graph.get_submodule(layer.weight_quantizer)
        assert isinstance(quantizer, WeightQuantizer)
        codes = quantizer.codes(weight, number_format)
    else:
        one_scale = replace(number_format, granularity=PerTensor())
        (scale,) = mse_weight_scales(weight, [one_scale], 0)
        codes = nearest_codes(weight, scale, one_scale)
    if not number_format.is_integer:
        codes = torch.where(codes == 1 << (number_format.bits - 1), 0, codes)
    return codes, number_format.qmin, number_format.qmax


def _distinct(group: Group) -> list[Layer]:
    """One layer for every weight of a group; calls of one weight share its codes."""
    return list({layer.weight: layer for layer in group.layers}.values())


def _check_options(gain: str, scales: str) -> None:
    if gain not in GAINS:
        raise FxmpqError(f"no gain {gain!r}; there are {', '.join(GAINS)}")
    if scales not in SCALES:
        raise FxmpqError(f"no scales {scales!r}; there are {', '.join(SCALES)}")


def _check_two_widths(groups: Sequence[Group]) -> None:
    for group in groups:
        widths = sorted({c.weight_bits for c in group.candidates if c.weight_bits is not None})
        if len(widths) > 2:
            raise FxmpqError(
                f"gain='entropy' chooses between two weight widths; group {group.name!r} has "
                f"{len(widths)}: {', '.join(map(str, widths))}. Prepare with two, or take "
                "gain='difference'"
            )
