"""Energy: an estimate from published figures of arithmetic and memory."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import fx

from fxmpq.costs.figures import KindFigures, MetricFigures
from fxmpq.costs.parts import MetricParts
from fxmpq.formats import NumberFormat, Precision
from fxmpq.graph.operators import OPERATORS
from fxmpq.graph.state import require_groups

METRIC = "energy"

# Picojoules in 45 nm at 0.9 V, from Figure 1.1.9 of M. Horowitz, "Computing's energy problem (and
# what we can do about it)", ISSCC 2014, pages 10 to 14, doi:10.1109/ISSCC.2014.6757323.
_INT8_MULTIPLY = 0.2
_INT32_ADD = 0.1
_FLOAT16_MULTIPLY = 1.1
_FLOAT32_MULTIPLY = 3.7
_FLOAT32_ADD = 0.9
# 1.3 nJ, the lower end, for 64 bits of DRAM.
_DRAM_BYTE = 1300 / 8


def energy(graph: fx.GraphModule) -> MetricParts:
    """Estimate what each group spends at each of its candidates, in picojoules for one sample.

    A group at a precision spends `MACs (multiply + add) + 162.5 weight bytes`, with the figures
    `energy_figures` tells: every multiply-accumulate of its layers and products, and one read of
    its stored weights, scales included, from DRAM. A table that is looked up, as an embedding, is
    not read as a whole, and counts as nothing. Products that stay float are a fixed part.

    What is left out: activations, which a chip keeps near its arithmetic; caches, control,
    normalisation and activation functions. So compare precisions of one model by it, not chips.
    Figures of one's own take its place where a target file has `metrics.energy`.

    Args:
        graph: From `prepare` or later.

    Returns:
        What groups spend, with the float model's total.

    Raises:
        FxmpqError: If the graph has no groups.

    Examples:
        >>> import torch, fxmpq
        >>> model = torch.nn.Sequential(torch.nn.Linear(100, 10))
        >>> graph = fxmpq.trace(model, torch.ones(2, 100))
        >>> found = energy(fxmpq.prepare(graph, "reference", candidates=["w4a8", "w8a8"]))
        >>> {name: round(value) for name, value in found.rows["0"].items()}
        {'w4a8': 87950, 'w8a8': 169300}
        >>> round(found.float_total)  # 1000 (3.7 + 0.9) + 4000 * 162.5
        654600
    """
    state = require_groups(graph, stage="prepared")
    used = {candidate for group in state.groups for candidate in group.candidates}
    figures = energy_figures(used)
    fixed = figures.float_cost(sum(entry.macs for entry in state.left_float))
    rows = {
        group.name: {
            str(candidate): figures.group_cost(group, candidate) for candidate in group.candidates
        }
        for group in state.groups
    }
    in_float = [figures.group_cost(group, Precision()) for group in state.groups]
    return MetricParts(rows, fixed=fixed, float_total=math.fsum([fixed, *in_float]))


def energy_figures(precisions: Iterable[Precision]) -> MetricFigures:
    """The figures of a multiply-accumulate at some precisions, in picojoules.

    By Horowitz, ISSCC 2014, Figure 1.1.9 (45 nm, 0.9 V): an 8-bit integer multiplication takes
    0.2, a 32-bit integer addition 0.1, a multiplication of 16-bit floats 1.1 and of 32-bit ones
    3.7, an addition of 32-bit floats 0.9, and 64 bits from DRAM 1300 to 2600, the least of which
    is taken. He gives no other widths, so **these are assumptions**:

    - Integers of `a` and `b` bits multiply for `0.2 a b / 64`, as an array multiplier's size grows
      (32 bits: 3.2, and Horowitz has 3.1), and are summed in 32 bits.
    - Small floats, and integers with small floats, multiply as 16-bit floats and are summed in 32.
    - Where one factor is in float, both are: weights alone in few bits save reads, not arithmetic.

    Args:
        precisions: Any; figures for their products of activations, and for `fp32`, come besides.

    Returns:
        Figures of all kinds; kinds that look up a table have no cost of reading.

    Examples:
        >>> found = energy_figures([Precision.parse("w4a8")]).general.per_mac
        >>> {name: round(value, 3) for name, value in found.items()}
        {'w4a8': 0.2, 'a8': 0.3, 'fp32': 4.6}
    """
    per_mac = {}
    for precision in sorted(precisions, key=lambda found: found.sort_key):
        weight, activation = precision.weight, precision.activation
        per_mac[str(precision)] = _multiply_accumulate(weight, activation)
        per_mac[str(precision.activation_only)] = _multiply_accumulate(activation, activation)
    per_mac[str(Precision())] = _multiply_accumulate(None, None)
    look_ups = {entry.kind for entry in OPERATORS.values() if not entry.quantizes_input}
    general = KindFigures(per_mac, per_weight_byte=_DRAM_BYTE)
    return MetricFigures(METRIC, general, {kind: KindFigures(per_mac) for kind in look_ups})


def _multiply_accumulate(one: NumberFormat | None, other: NumberFormat | None) -> float:
    if one is None or other is None:
        return _FLOAT32_MULTIPLY + _FLOAT32_ADD
    if one.is_integer and other.is_integer:
        return _INT8_MULTIPLY * one.bits * other.bits / 64 + _INT32_ADD
    return _FLOAT16_MULTIPLY + _FLOAT32_ADD
