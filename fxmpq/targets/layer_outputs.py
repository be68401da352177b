"""What layers compute in a converted graph that torch runs, node by node."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, fx

from fxmpq.graph.batches import Batch, flat_inputs
from fxmpq.targets.target import LayerValue


class LayerOutputs(fx.Interpreter):
    """Runs a converted graph whose layers' nodes are named as in the planned one.

    Args:
        graph: The converted graph.
        layers: Names of layers by the names of their nodes.
    """

    def __init__(self, graph: fx.GraphModule, layers: Mapping[str, str]) -> None:
        super().__init__(graph)
        self._graph, self._layers = graph, layers
        self._found: list[LayerValue] = []

    def run_node(self, n: fx.Node) -> object:
        """Run a node; keep what a layer's returns."""
        result = super().run_node(n)
        if n.name in self._layers and isinstance(result, Tensor):
            self._found.append(LayerValue(self._layers[n.name], n.name, result))
        return result

    def collect(self, batch: Batch) -> list[LayerValue]:
        """What each layer computes on a batch, in the order they run."""
        self._found = []
        with torch.no_grad():
            self.run(*flat_inputs(self._graph, batch), enable_io_processing=False)
        return self._found
