"""Peak activation memory: the most bytes of activations that are alive at once."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence

import numpy as np
from torch import fx

from fxmpq.costs.lifetimes import Lifetimes, Piece
from fxmpq.costs.parts import MetricParts
from fxmpq.costs.stored_values import find_stored_values
from fxmpq.costs.terms import Moment
from fxmpq.graph.rules import TargetRules
from fxmpq.graph.state import Group, require_groups


def activation_memory(graph: fx.GraphModule, rules: TargetRules) -> MetricParts:
    """Find what is alive at once, and how much of it each group's precision decides.

    A plan's peak is `max over moments t of sum over tensors alive at t of bytes`, in bytes for one
    sample, with `N` values taking `ceil(N b / 8)` bytes where the target stores them in codes of
    `b` bits, the activation bits of the group that owns them, and the float model's bytes (4 a
    value) elsewhere. For a chain of layers that is the largest sum of a layer's input and output,
    the read-write memory of Rusci et al. 2019 (arXiv 1905.13082); a residual branch is added
    while it waits.

    Nodes run in the graph's order. A tensor is alive from the operator that makes it to the last
    one that reads it, both included; inputs from the start, and outputs to the end. Further:

    - Reshaped, transposed and sliced tensors that PyTorch gives as views are no tensors of their
      own.
    - Of operators that the target fuses only the last result is stored, when the last one runs.
    - An activation function (`ACTIVATIONS`) overwrites the float tensor it reads if nothing else
      reads that.
    - A tensor that only its quantizer reads is written in codes at once, and an input comes so;
      where others read it in float too, the codes are stored beside it. Codes with a range that
      is found at run time are made within a layer and not stored.
    - Operators read codes as they are; those of `MOVEMENTS` and of `rules.through` write codes.
    - Weights, tables computed from them, and what an operator uses within itself (as scores of
      fused attention, or unfolded patches) are left out.

    It is exact under these rules where each group's activations are codes at all its candidates, or
    at none. Where a group may have either, it is an upper bound in rare cases, such as a tensor in
    codes that another group may quantize once more: the first codes count as long as either is
    read.

    Args:
        graph: From `prepare` or later, for one sample of whose example batch it counts.
        rules: Of the target it was prepared for.

    Returns:
        The moments, without those that never exceed another one, and the float model's peak.

    Raises:
        FxmpqError: If the graph has no groups.

    Examples:
        >>> import torch, fxmpq
        >>> from fxmpq.targets.reference import REFERENCE
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 100), torch.nn.Linear(100, 8))
        >>> graph = fxmpq.prepare(fxmpq.trace(model, torch.ones(2, 8)), "reference",
        ...     candidates=["w8a2", "w8a8"])
        >>> found = activation_memory(graph, REFERENCE.rules)
        >>> found.float_total
        432
        >>> max(moment.total({"0": "w8a2", "1": "w8a8"}) for moment in found.moments)
        132
    """
    state = require_groups(graph, stage="prepared")
    stored = find_stored_values(graph)
    names = [node.name for node in graph.graph.nodes]
    owners = {name: group for group in state.groups for name in group.activation_quantizers}
    alive = Lifetimes(graph, stored, owners, rules).pieces()
    alive_in_float = Lifetimes(graph, stored, {}, rules).pieces()
    return MetricParts(
        float_total=max(moment.fixed for moment in _moments(alive_in_float, (), names)),
        moments=_moments(alive, state.groups, names),
    )


def _moments(
    pieces: Sequence[Piece], groups: Sequence[Group], names: Sequence[str]
) -> tuple[Moment, ...]:
    """What is alive at each instant where something begins, unless another one has no less.

    A row of the table has the fixed bytes, and behind them each group's by candidate.
    """
    starts = np.cumsum([0, 1, *(len(group.candidates) for group in groups)])
    places = {group.name: start for group, start in zip(groups, starts[1:-1], strict=True)}
    instants = sorted({piece.begin for piece in pieces})
    change = np.zeros((len(instants) + 1, starts[-1]), dtype=np.int64)
    for piece in pieces:
        span = bisect_left(instants, piece.begin), bisect_right(instants, piece.end)
        columns, sizes = slice(0, 1), [piece.bytes]
        if piece.group is not None:
            start = places[piece.group.name]
            columns = slice(start, start + len(piece.group.candidates))
            sizes = [piece.size(candidate) for candidate in piece.group.candidates]
        change[span[0], columns] += sizes
        change[span[1], columns] -= sizes
    table = np.cumsum(change[:-1], axis=0)
    return tuple(
        _moment(names[instants[index] // 2], table[index].tolist(), groups, places)
        for index in _undominated(table, starts[:-1])
    )


def _undominated(table: np.ndarray, starts: np.ndarray) -> list[int]:
    """Rows that exceed every other one under some choice: a column for each section."""
    kept: list[int] = []
    largest = np.maximum.reduceat(table, starts, axis=1).sum(axis=1)
    for index in np.argsort(-largest, kind="stable").tolist():
        excess = np.maximum.reduceat(table[index] - table[kept], starts, axis=1).sum(axis=1)
        if not (excess <= 0).any():
            kept.append(index)
    return sorted(kept)


def _moment(
    node: str, row: Sequence[int], groups: Sequence[Group], places: Mapping[str, int]
) -> Moment:
    """A row as a moment; what a group has whatever its precision is fixed."""
    fixed, rows = row[0], {}
    for group in groups:
        start = places[group.name]
        sizes = row[start : start + len(group.candidates)]
        if len(set(sizes)) == 1:
            fixed += sizes[0]
        else:
            rows[group.name] = dict(zip(map(str, group.candidates), sizes, strict=True))
    return Moment(node, fixed, rows)
