"""What refinement did to each layer, as rows and as a table of layers by methods."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from fxmpq.graph.state import GraphState, state_of
from fxmpq.report.report import RefinementRow
from fxmpq.targets.outcome import layer_precision

WHOLE_MODEL = "whole model"
_LOWEST_DB = -100.0


@dataclass(frozen=True)
class Cell:
    """One method's work on one layer, in dB.

    Args:
        before: SQNR of the layer's output before; `None` if there was no error.
        after: The same afterwards.
    """

    before: float | None
    after: float | None

    @property
    def gain(self) -> float:
        """By how much the SQNR rose, in dB; 0 where one of the two is without any error."""
        return 0.0 if self.before is None or self.after is None else self.after - self.before


@dataclass(frozen=True)
class RefinementGrid:
    """Layers by methods.

    Args:
        methods: The methods in their order; one that was used again has a number behind it.
        layers: Layers in graph order, then the whole model.
        cells: What there is, by layer and method.
    """

    methods: tuple[str, ...]
    layers: tuple[str, ...]
    cells: dict[tuple[str, str], Cell]


def refinement_rows(graph: fx.GraphModule) -> tuple[RefinementRow, ...]:
    """What a planned graph's refinements did, in decibels.

    A relative squared error `e` of a layer's output is an SQNR of `-10 log10 e` dB. Of formats
    that were refined before there was a plan, only those that the plan chose are told.

    Args:
        graph: With chosen precisions; refined or not.

    Returns:
        A row a refinement, in order.
    """
    state = state_of(graph)
    chosen = _weight_formats(state)
    return tuple(
        RefinementRow(found.method, found.layer, _decibels(found.before), _decibels(found.after))
        for found in state.refinements
        if found.weight_format in ("", chosen.get(found.layer))
    )


def refinement_grid(rows: Sequence[RefinementRow], order: Sequence[str] = ()) -> RefinementGrid:
    """Arrange rows by layer and method.

    Args:
        rows: From `refinement_rows`.
        order: Names of layers in graph order; others follow as they come.

    Returns:
        The grid; without rows it is empty.

    Examples:
        >>> row = RefinementRow("gptq", "conv", 10.0, 12.5)
        >>> grid = refinement_grid([row])
        >>> grid.methods, grid.cells["conv", "gptq"].gain
        (('gptq',), 2.5)
    """
    cells: dict[tuple[str, str], Cell] = {}
    for row in rows:
        layer, name, times = row.layer or WHOLE_MODEL, row.method, 1
        while (layer, name) in cells:
            times += 1
            name = f"{row.method} ({times})"
        cells[layer, name] = Cell(row.before_db, row.after_db)
    methods = tuple(dict.fromkeys(method for _, method in cells))
    known = dict.fromkeys(layer for layer, _ in cells)
    layers = [layer for layer in dict.fromkeys([*order, *known]) if layer in known]
    layers.sort(key=lambda layer: layer == WHOLE_MODEL)
    return RefinementGrid(methods, tuple(layers), cells)


def refinement_rows_text(grid: RefinementGrid) -> dict[str, tuple[tuple[str, str], ...]]:
    """A grid's cells as text: the SQNR afterwards in dB, and the gain with its sign.

    Args:
        grid: From `refinement_grid`.

    Returns:
        Per layer a pair a method, of empty texts where the method did nothing.

    Examples:
        >>> refinement_rows_text(refinement_grid([RefinementRow("gptq", "conv", 10.0, 12.5)]))
        {'conv': (('12.5', '+2.5'),)}
    """
    return {
        layer: tuple(_text(grid.cells.get((layer, method))) for method in grid.methods)
        for layer in grid.layers
    }


def _text(cell: Cell | None) -> tuple[str, str]:
    if cell is None:
        return "", ""
    return ("exact", "") if cell.after is None else (f"{cell.after:.1f}", f"{cell.gain:+.1f}")


def _weight_formats(state: GraphState) -> dict[str, str]:
    """Name of each quantized layer's weight format."""
    found = {}
    for group in state.groups:
        chosen = group.candidate(state.choices[group.name])
        for layer in group.layers:
            weight = layer_precision(layer, chosen).weight
            if weight is not None:
                found[layer.name] = weight.name
    return found


def _decibels(error: float) -> float | None:
    """An SQNR that JSON can hold: an output that should be all zeros counts -100 dB."""
    if error <= 0:
        return None
    return max(-10 * math.log10(error), _LOWEST_DB)
