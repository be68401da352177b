"""The best state of some quantizers that training came past."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from fxmpq.graph.batches import graph_device
from fxmpq.refinement.units import quantizer_tensors, set_quantizer_tensors


class BestSeen:
    """Remembers the state of quantizer modules at which an error was least.

    Args:
        graph: Holds the modules.
        modules: Names of quantizers and bias corrections.
        error: Of their present state, which is the first to be remembered.
    """

    def __init__(self, graph: fx.GraphModule, modules: Sequence[str], error: float) -> None:
        self._modules = {name: graph.get_submodule(name) for name in modules}
        self._device = graph_device(graph)
        self.error = error
        self._keep()

    def offer(self, error: float) -> None:
        """Remember the present state if its error is less; one that is not a number is not."""
        if error < self.error:
            self.error = error
            self._keep()

    def restore(self) -> None:
        """Bring back the state that was remembered."""
        for name, module in self._modules.items():
            set_quantizer_tensors(module, self._kept[name], self._device)

    def _keep(self) -> None:
        self._kept = {name: quantizer_tensors(module) for name, module in self._modules.items()}
