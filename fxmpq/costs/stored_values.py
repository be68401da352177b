"""Which pieces of memory a graph's values lie in, and which operators read them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxmpq.graph.batches import batch_size, fixed_size, graph_device
from fxmpq.graph.state import state_of
from fxmpq.quantizers.modules import ActivationQuantizer, BiasCorrection, WeightQuantizer

_SYMBOL = re.compile(r"[A-Za-z_]\w*")


@dataclass(eq=False)
class StoredValue:
    """A piece of memory that one operator makes, and that views of it share.

    Args:
        node: The node that makes it.
        values: How many numbers it holds, for one sample.
        width: Bytes a number takes as the float model computes it.
        copied: What a quantizer made it from; `None` for what anything else computes.
        readers: The nodes that read it, through whatever views.
    """

    node: fx.Node
    values: int
    width: int
    copied: StoredValue | None = None
    readers: list[fx.Node] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        """What it takes as the float model computes it."""
        return self.values * self.width


@dataclass(frozen=True)
class StoredValues:
    """The memory of a graph's values.

    Args:
        made: Every piece, in graph order.
        of: By node, what its result lies in; a node without an entry computes nothing that
            depends on the model's inputs.
    """

    made: tuple[StoredValue, ...]
    of: Mapping[fx.Node, tuple[StoredValue, ...]]


def find_stored_values(graph: fx.GraphModule) -> StoredValues:
    """Run the example batch and find what is stored where.

    Results that share their input's memory, as reshaped, transposed or sliced tensors do, are no
    pieces of their own. A quantizer's result is one, whatever precision is chosen. Weights, and
    what is computed from stored tensors alone, are no values.

    Args:
        graph: From `prepare` or later.

    Returns:
        The pieces of memory, with their sizes for one sample.
    """
    device = graph_device(graph)
    leaves = [
        leaf.to(device) if isinstance(leaf, Tensor) else leaf for leaf in state_of(graph).example
    ]
    finder = _Finder(graph)
    with torch.no_grad():
        finder.run(*leaves, enable_io_processing=False)
    return StoredValues(tuple(finder.made), finder.of)


class _Finder(fx.Interpreter):
    """Runs a graph and follows the memory of its values.

    Args:
        graph: With groups.
    """

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.made: list[StoredValue] = []
        self.of: dict[fx.Node, tuple[StoredValue, ...]] = {}
        # By torch's number of a piece of memory, which holds while a tensor in it is kept.
        self._numbered: dict[fx.Node, dict[int, StoredValue | None]] = {}
        self._samples = batch_size(state_of(graph).example)
        self._batches = _batch_symbols(graph)
        self._per_sample: set[fx.Node] = set()

    def run_node(self, n: fx.Node) -> object:
        """Run a node and note what its result lies in."""
        module = self.submodules.get(str(n.target)) if n.op == "call_module" else None
        is_quantizer = isinstance(module, ActivationQuantizer)
        result = self.env[n.all_input_nodes[0]].clone() if is_quantizer else super().run_node(n)
        tensors = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
        if n.op == "output":
            self._note_reader(n)
        elif self._is_constant(n, module):
            self._numbered[n] = {_number(tensor): None for tensor in tensors}
        else:
            self._note(n, tensors, is_copy=is_quantizer)
        return result

    def _note(self, node: fx.Node, tensors: list[Tensor], *, is_copy: bool) -> None:
        """Note a result: its memory is an input's, or new."""
        if self._depends_on_batch(node, tensors):
            self._per_sample.add(node)
        known: dict[int, StoredValue | None] = {}
        for source in node.all_input_nodes:
            known.update(self._numbered[source])
        numbered: dict[int, StoredValue | None] = {}
        for tensor in tensors:
            number = _number(tensor)
            if number not in known:
                values = tensor.numel()
                if node in self._per_sample:
                    values = -(-values // self._samples)
                read = self.of[node.all_input_nodes[0]] if is_copy else ()
                made = StoredValue(node, values, tensor.element_size(), next(iter(read), None))
                self.made.append(made)
                known[number] = made
            numbered[number] = known[number]
        self._numbered[node] = numbered
        self.of[node] = tuple(stored for stored in numbered.values() if stored is not None)
        if tensors:
            # What returns no tensor, as a size does, reads no values.
            self._note_reader(node)

    def _note_reader(self, node: fx.Node) -> None:
        """Note that a node reads its inputs' memory, apart from what its result shares."""
        shared = self.of.get(node, ())
        read = (stored for source in node.all_input_nodes for stored in self.of.get(source, ()))
        for stored in dict.fromkeys(read):
            if stored not in shared:
                stored.readers.append(node)

    def _is_constant(self, node: fx.Node, module: object) -> bool:
        """Whether a node's result is the same in every call."""
        if node.op == "get_attr" or isinstance(module, (WeightQuantizer, BiasCorrection)):
            return True
        is_random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        inputs = node.all_input_nodes
        return bool(inputs) and not is_random and not any(source in self.of for source in inputs)

    def _depends_on_batch(self, node: fx.Node, tensors: list[Tensor]) -> bool:
        """Whether a result grows with the number of samples."""
        recorded = [
            leaf for leaf in pytree.tree_leaves(node.meta.get("val")) if isinstance(leaf, Tensor)
        ]
        if self._batches and recorded:
            sizes = {name for leaf in recorded for name in _SYMBOL.findall(str(list(leaf.shape)))}
            return not self._batches.isdisjoint(sizes)
        if node.op == "placeholder":
            return any(tensor.shape[:1] == (self._samples,) for tensor in tensors)
        return any(source in self._per_sample for source in node.all_input_nodes)


def _number(tensor: Tensor) -> int:
    number: int = tensor.untyped_storage()._cdata
    return number


def _batch_symbols(graph: fx.GraphModule) -> set[str]:
    """The names that the export gave to the number of samples; none where it is fixed."""
    found = set()
    for node in graph.graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        if isinstance(value, Tensor) and value.dim() > 0 and fixed_size(value.shape[0]) is None:
            found.add(str(value.shape[0]))
    return found
