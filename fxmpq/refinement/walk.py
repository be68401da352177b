"""Walking a planned graph in float and quantized at once: each layer meets its real input."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, fx
from torch.fx.node import Argument

from fxmpq.graph.attributes import get_tensor
from fxmpq.graph.batches import Batch, flat_inputs
from fxmpq.graph.state import require
from fxmpq.quantizers.modules import ActivationQuantizer
from fxmpq.refinement.blocks import find_blocks
from fxmpq.refinement.views import BlockView, LayerView

Overrides = Mapping[str, Callable[[Tensor], Tensor]]
"""Stand-ins for quantizer modules, by module name."""

Values = dict[fx.Node, object]


class Walk:
    """Takes all batches through a planned graph node by node, in float and in quantized form.

    Before a layer (or a block) is run, it is handed out with its inputs: those of the float
    model, and those of the model whose earlier layers are quantized as they now are. Whoever
    receives it may change its quantizers; the walk then runs the layer with them, so that later
    layers meet what earlier ones became.

    Memory: the values that later nodes still read, of all batches, twice; what only the output
    reads is not kept. Cost: one float and one quantized pass, besides what is done with the layers.

    Args:
        graph: With chosen precisions; its quantizers may be changed during the walk.
        batches: What the model takes.
    """

    def __init__(self, graph: fx.GraphModule, batches: Sequence[Batch]) -> None:
        require(graph, stage="calibrated")
        self.graph = graph
        self._nodes = [node for node in graph.graph.nodes if node.op != "output"]
        self._modules: dict[str, torch.nn.Module] = dict(graph.named_modules())
        self._stored = _stored_nodes(self._nodes, self._modules)
        self._reads = _stored_sources(self._nodes, self._stored)
        self._last_reader: dict[fx.Node, fx.Node] = {}
        for node in self._nodes:
            if node in self._stored:
                self._last_reader.update(dict.fromkeys(self._reads[node], node))
        placeholders = [node for node in self._nodes if node.op == "placeholder"]
        with torch.inference_mode(False):
            given = [[_detached(leaf) for leaf in flat_inputs(graph, batch)] for batch in batches]
        self._float: list[Values] = [dict(zip(placeholders, one, strict=True)) for one in given]
        self._quantized: list[Values] = [dict(found) for found in self._float]

    def __len__(self) -> int:
        return len(self._float)

    def layers(self) -> Iterator[LayerView]:
        """Hand out every layer whose weight is quantized, in graph order, just before it runs."""
        found = {
            layer.node: (group, layer)
            for group in require(self.graph, stage="calibrated").groups
            for layer in group.layers
        }
        seen: set[str] = set()
        for node in self._nodes:
            if node.name in found and node in self._stored:
                group, layer = found[node.name]
                view = LayerView(self, group, layer, node, is_first=layer.weight not in seen)
                if view.is_quantized:
                    seen.add(layer.weight)
                    yield view
            self._advance([node])

    def blocks(self) -> Iterator[BlockView]:
        """Hand out every block with a quantized layer, in graph order, just before it runs."""
        for block in find_blocks(self.graph):
            view = BlockView(self, block)
            if view.layers:
                yield view
            self._advance(block.nodes)

    def value(self, node: fx.Node, batch: int, *, quantized: bool) -> object:
        """A node's value in one batch, as far as the walk has come."""
        values = self._quantized if quantized else self._float
        return self._read(node, values[batch], {} if quantized else None)

    def float_result(self, node: fx.Node, batch: int) -> object:
        """What the next node gives in the float model; kept, so that it runs there only once."""
        values = self._float[batch]
        if node not in values:
            with torch.inference_mode(False), torch.no_grad():
                values[node] = self._compute(node, values, None)
        return values[node]

    def run(
        self, nodes: Sequence[fx.Node], batch: int, *, quantized: bool, overrides: Overrides
    ) -> Values:
        """Run some nodes on one batch from where the walk stands; nothing is kept.

        Every quantizer runs once, however many nodes read it.

        Args:
            nodes: In graph order; what they read is among them or has been walked past.
            batch: Number of the batch.
            quantized: Whether in quantized form.
            overrides: Stand-ins for quantizers, with gradients if they have them.

        Returns:
            All values that were stored or computed, by node.
        """
        values = dict((self._quantized if quantized else self._float)[batch])
        for node in nodes:
            if node in self._stored and node.op != "placeholder":
                values[node] = self._compute(node, values, overrides if quantized else None, values)
        return values

    def _advance(self, nodes: Sequence[fx.Node]) -> None:
        for node in nodes:
            if node in self._stored and node.op != "placeholder":
                self._step(node)

    def _step(self, node: fx.Node) -> None:
        """Run one node on all batches, in both forms, and forget what nobody reads any more."""
        with torch.inference_mode(False), torch.no_grad():
            for form, overrides in ((self._float, None), (self._quantized, {})):
                constants: Values = {}
                for values in form:
                    if node not in values:
                        values[node] = self._compute(node, values, overrides, constants)
        done = [source for source in self._reads[node] if self._last_reader[source] is node]
        if node not in self._last_reader:
            done.append(node)
        for source in done:
            for values in (*self._float, *self._quantized):
                values.pop(source, None)

    def _compute(
        self,
        node: fx.Node,
        values: Values,
        overrides: Overrides | None,
        found_before: Values | None = None,
    ) -> object:
        """Call a node's operator; `overrides` is `None` in the float form."""

        def read(source: fx.Node) -> Argument:
            return cast(Argument, self._read(source, values, overrides, found_before))

        args = fx.node.map_arg(node.args, read)
        kwargs = fx.node.map_arg(node.kwargs, read)
        if node.op == "call_module":
            return self._call(str(node.target), args, overrides)
        if node.op == "get_attr":
            # The model's own parameters are to get no gradients.
            return get_tensor(self.graph, str(node.target)).detach()
        assert callable(node.target)
        return node.target(*args, **kwargs)

    def _call(self, name: str, args: tuple[object, ...], overrides: Overrides | None) -> object:
        if overrides is None:
            return args[0]
        stand_in = overrides.get(name)
        return self._modules[name](*args) if stand_in is None else stand_in(*args)  # type: ignore[arg-type]

    def _read(
        self,
        node: fx.Node,
        values: Values,
        overrides: Overrides | None,
        found_before: Values | None = None,
    ) -> object:
        """A stored value, or one that is computed.

        What is computed is kept in `found_before`: all of it where that is `values`, which are
        one batch's, else what no batch changes.
        """
        for known in (values, found_before or {}):
            if node in known:
                return known[node]
        found = self._compute(node, values, overrides, found_before)
        is_lasting = found_before is values or not self._reads[node]
        if found_before is not None and is_lasting:
            found_before[node] = found
        return found


def _detached(leaf: object) -> object:
    """An input to which no gradients flow: a batch of the user's gets none."""
    return leaf.detach() if isinstance(leaf, Tensor) else leaf


def _stored_nodes(
    nodes: Sequence[fx.Node], modules: Mapping[str, torch.nn.Module]
) -> frozenset[fx.Node]:
    """Nodes whose values are kept: what depends on the input, but for quantizers' results.

    What a quantizer gives is found anew by each reader, so that it follows the quantizer's
    changes and is not held beside its source; constants and quantized weights likewise.
    """
    stored: set[fx.Node] = set()
    reached: set[fx.Node] = set()
    for node in nodes:
        if node.op == "placeholder" or any(source in reached for source in node.all_input_nodes):
            reached.add(node)
            module = modules.get(str(node.target)) if node.op == "call_module" else None
            if not isinstance(module, ActivationQuantizer):
                stored.add(node)
    return frozenset(stored)


def _stored_sources(
    nodes: Sequence[fx.Node], stored: frozenset[fx.Node]
) -> dict[fx.Node, tuple[fx.Node, ...]]:
    """The stored nodes that each node reads, through those that are not stored."""
    reads: dict[fx.Node, tuple[fx.Node, ...]] = {}
    for node in nodes:
        found: dict[fx.Node, None] = {}
        for source in node.all_input_nodes:
            found.update(dict.fromkeys([source] if source in stored else reads[source]))
        reads[node] = tuple(found)
    return reads
