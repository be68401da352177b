"""Codes of activations: computed once a tensor and kind, whoever reads them."""

from __future__ import annotations

import torch
from torch import fx

from fxmpq.formats import NumberFormat
from fxmpq.quantizers.modules import ActivationQuantizer
from fxmpq.quantizers.ranges import ActivationRange
from fxmpq.targets.cuda.arithmetic import to_e4m3, to_int8
from fxmpq.targets.cuda.rewrite_int8 import SIGNED
from fxmpq.targets.lowering import quantizer_of


class ActivationCodes:
    """Inserts nodes that quantize activations, each once.

    Quantizers that something else reads too, a layer on dequantized weights, stay where they are.

    Args:
        graph: From `lower`; changed in place.
    """

    def __init__(self, graph: fx.GraphModule) -> None:
        self._graph = graph
        self._codes: dict[fx.Node, fx.Node] = {}

    def grid(self, value: object) -> ActivationRange | None:
        """The grid of a quantized activation, or `None` of anything else."""
        found = self._quantizer(value)
        return None if found is None else found[1]

    def of(self, value: fx.Node) -> fx.Node:
        """The node that gives the codes of a quantized activation, or a float one itself."""
        found = self._quantizer(value)
        if found is None:
            return value
        if value not in self._codes:
            number_format, grid = found
            source = value.args[0]
            with self._graph.graph.inserting_before(value):
                self._codes[value] = self._insert(source, number_format, grid)
        return self._codes[value]

    def _insert(
        self, source: fx.node.Argument, number_format: NumberFormat, grid: ActivationRange
    ) -> fx.Node:
        call = self._graph.graph.call_function
        if not number_format.is_integer:
            return call(to_e4m3, (source, grid.scale))
        # As torch's own quantization takes it: multiplied by what it holds in float32.
        inverse = float(1.0 / torch.tensor(grid.scale, dtype=torch.float32))
        return call(to_int8, (source, inverse, grid.zero_point - SIGNED))

    def _quantizer(self, value: object) -> tuple[NumberFormat, ActivationRange] | None:
        quantizer = quantizer_of(self._graph, value)
        if not isinstance(quantizer, ActivationQuantizer) or quantizer.active is None:
            return None
        grid = quantizer.ranges.get(quantizer.active.name)
        return None if grid is None else (quantizer.active, grid)
