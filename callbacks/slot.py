"""The place of the network inside a LightningModule: the float network, or the graph."""

from __future__ import annotations

from lightning.pytorch import LightningModule
from torch import fx, nn

from fxmpq.callbacks.surgery import find_submodule, replace_submodule
from fxmpq.graph.batches import graph_device


class NetworkSlot:
    """One attribute of a LightningModule, and what has been taken out of it.

    Args:
        path: Attribute path of the network.

    Attributes:
        path: As given.
        float_network: What the graph replaced; `None` before.
        graph: What replaced it; `None` before.

    Examples:
        >>> module = LightningModule()
        >>> module.model = nn.ReLU()
        >>> slot = NetworkSlot("model")
        >>> slot.put_graph(module, fx.symbolic_trace(module.model))
        >>> slot.holds_graph(module), slot.float_network
        (True, ReLU())
        >>> slot.put_float_back(module)
        True
        >>> module.model
        ReLU()
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.float_network: nn.Module | None = None
        self.graph: fx.GraphModule | None = None
        self._training_flags: dict[nn.Module, bool] = {}

    def holds_graph(self, module: LightningModule) -> bool:
        """Whether the module has this slot's graph in its network's place."""
        found = dict(module.named_modules(remove_duplicate=False)).get(self.path)
        return found is not None and found is self.graph

    def put_float_back(self, module: LightningModule) -> bool:
        """Put the float network back if the graph is there; returns whether it was."""
        if not self.holds_graph(module):
            return False
        assert self.float_network is not None
        replace_submodule(module, self.path, self.float_network)
        return True

    def remember_flags(self, module: LightningModule) -> None:
        """Note the training flags, before a run switches to evaluation."""
        self._training_flags = {child: child.training for child in module.modules()}

    def put_graph(self, module: LightningModule, graph: fx.GraphModule) -> None:
        """Put a graph in the network's place, and give the network its training flags back.

        A loop restores the flags when it ends, but only of what is then in the module.
        Networks made since `remember_flags` are set to training, as new modules are.

        Raises:
            MisconfigurationException: If there is no network.
        """
        network = find_submodule(module, self.path)
        replace_submodule(module, self.path, graph)
        self.float_network, self.graph = network, graph
        for child in network.modules():
            child.training = self._training_flags.get(child, True)

    def restore_float_weights(self, weights: dict[str, object]) -> None:
        """Replace the graph's entries of a module's state dict by the float network's, in place."""
        assert self.float_network is not None
        prefix = f"{self.path}."
        for name in [name for name in weights if name.startswith(prefix)]:
            del weights[name]
        weights.update(self.float_network.state_dict(prefix=prefix))

    def follow_device(self, *others: nn.Module) -> None:
        """Move the float network, and others, to the device that the graph is on now."""
        assert self.float_network is not None and self.graph is not None
        for module in (self.float_network, *others):
            module.to(graph_device(self.graph))
