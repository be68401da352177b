"""Cutting a few nodes out of a graph, as a model of their own."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from fxmpq.graph.attributes import get_tensor
from fxmpq.graph.batches import batch_size, fixed_size
from fxmpq.graph.operators import OPERATORS, argument
from fxmpq.graph.state import node_shape, state_of
from fxmpq.quantizers.modules import ActivationQuantizer, BiasCorrection, WeightQuantizer

_SEED = 0
_SYMBOL = re.compile(r"[A-Za-z_]\w*")


@dataclass(frozen=True, eq=False)
class Piece:
    """A part of a model that runs by itself.

    Args:
        module: Takes the inputs in order and returns one tensor.
        inputs: Of the shapes that the part reads when the model runs on one sample, or on its
            example where the batch size is fixed.
        signature: Equal for parts that compute the same on equal shapes, whatever the weights.
    """

    module: fx.GraphModule
    inputs: tuple[Tensor, ...]
    signature: str


def cut(graph: fx.GraphModule, names: Collection[str], output: str) -> Piece:
    """Cut nodes out of a graph; what they read from elsewhere becomes an input.

    Args:
        graph: Traced, or prepared: its quantizers are left out.
        names: The nodes'.
        output: The one whose value is returned.

    Returns:
        The piece, which shares its weights with the graph. Real inputs are drawn from a normal
        distribution with a fixed seed, indices evenly from what they look up.
    """
    copier = _Copier(graph)
    for node in graph.graph.nodes:
        if node.name in names:
            copier.copy(node)
    return copier.finish(output)


def behind_quantizers(graph: fx.GraphModule, argument: object) -> object:
    """What an argument is where no quantizers are: past those, down to the tensor itself.

    Args:
        graph: Prepared, or not yet.
        argument: Of one of its nodes.
    """
    while isinstance(argument, fx.Node) and argument.op == "call_module":
        module = graph.get_submodule(str(argument.target))
        if not isinstance(module, (ActivationQuantizer, BiasCorrection, WeightQuantizer)):
            break
        argument = argument.args[0]
    return argument


class _Copier:
    """The piece so far."""

    def __init__(self, graph: fx.GraphModule) -> None:
        self._graph = graph
        self._root = nn.Module()
        self._nodes = fx.Graph()
        self._copies: dict[fx.Node, fx.Node] = {}
        self._inputs: list[Tensor] = []
        self._described: list[str] = []
        self._generator = torch.Generator().manual_seed(_SEED)
        state = state_of(graph)
        self._samples = batch_size(state.example)
        inputs = [node.meta.get("val") for node in graph.graph.find_nodes(op="placeholder")]
        self._batches = {
            str(value.shape[0])
            for value in inputs
            if state.dynamic
            and isinstance(value, Tensor)
            and value.dim()
            and fixed_size(value.shape[0]) is None
        }

    def copy(self, node: fx.Node) -> None:
        """Copy a node whose inputs within the piece are there."""
        mapped = [self._mapped(node, arg) for arg in node.args]
        named = {name: self._mapped(node, arg) for name, arg in node.kwargs.items()}
        copied = self._nodes.call_function(node.target, tuple(mapped), named)  # type: ignore[arg-type]
        # Layers are told by where in the model they come from.
        copied.meta = {k: v for k, v in node.meta.items() if k == "nn_module_stack"}
        self._copies[node] = copied
        numbers = {made: f"%{index}" for index, made in enumerate(self._nodes.nodes)}
        shown = fx.node.map_arg((copied.args, copied.kwargs), numbers.__getitem__)
        self._described.append(f"{node.target}{shown!r}")

    def finish(self, output: str) -> Piece:
        """The piece, which returns a node's value."""
        found = next(made for node, made in self._copies.items() if node.name == output)
        self._nodes.output(found)
        module = fx.GraphModule(self._root, self._nodes)
        digest = hashlib.sha256("\n".join(self._described).encode()).hexdigest()
        return Piece(module.eval(), tuple(self._inputs), digest)

    def _mapped(self, reader: fx.Node, argument: object) -> object:
        """An argument within the piece."""
        if isinstance(argument, (tuple, list)):
            return type(argument)(self._mapped(reader, entry) for entry in argument)
        argument = behind_quantizers(self._graph, argument)
        if not isinstance(argument, fx.Node):
            return argument
        if argument not in self._copies:
            self._copies[argument] = self._source(reader, argument)
        return self._copies[argument]

    def _source(self, reader: fx.Node, node: fx.Node) -> fx.Node:
        """A stored tensor, or an input of the piece."""
        if node.op == "get_attr":
            tensor = get_tensor(self._graph, str(node.target))
            name = f"tensor_{len(self._described)}_{node.name}"
            stored = nn.Parameter(tensor.detach(), requires_grad=False)
            if tensor.is_floating_point():
                self._root.register_parameter(name, stored)
            else:
                self._root.register_buffer(name, tensor)
            self._described.append(f"stored {tensor.dtype}{list(tensor.shape)}")
            return self._at_front("get_attr", name)
        found = self._drawn(reader, node)
        self._described.append(f"input {found.dtype}{list(found.shape)}")
        self._inputs.append(found)
        return self._at_front("placeholder", f"x{len(self._inputs)}")

    def _at_front(self, op: str, target: str) -> fx.Node:
        made = self._nodes.create_node(op, target)
        if op == "placeholder":
            first = next(iter(self._nodes.nodes))
            placed = [n for n in self._nodes.nodes if n.op == "placeholder" and n is not made]
            if placed:
                placed[-1].append(made)
            elif first is not made:
                first.prepend(made)
        return made

    def _of_one_sample(self, size: int, traced: int | torch.SymInt) -> int:
        """A size of the example as it is for one sample; samples may be flattened into it."""
        is_free = fixed_size(traced) is None
        has_samples = is_free and self._batches & set(_SYMBOL.findall(str(traced)))
        return max(size // self._samples, 1) if has_samples else size

    def _drawn(self, reader: fx.Node, node: fx.Node) -> Tensor:
        """Values of the shape and type that a node has in the example."""
        found, value = node_shape(node), node.meta["val"]
        assert found is not None
        sizes = zip(found, value.shape, strict=True)
        shape = tuple(self._of_one_sample(size, traced) for size, traced in sizes)
        if value.dtype.is_floating_point:
            return torch.randn(shape, generator=self._generator).to(value.dtype)
        operator = OPERATORS.get(reader.target)
        if operator is None or operator.kind != "embedding":
            return torch.zeros(shape, dtype=value.dtype)
        table = behind_quantizers(self._graph, argument(reader, operator.weight))
        assert isinstance(table, fx.Node)
        rows = len(get_tensor(self._graph, str(table.target)))
        drawn = torch.randint(0, rows, shape, generator=self._generator)
        return drawn.to(value.dtype)
