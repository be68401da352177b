"""A machine that runs a plan and weighs the activations it keeps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, fx

from fxmpq.formats import Precision
from fxmpq.graph.rules import TargetRules
from fxmpq.graph.state import copy_graph, state_of
from fxmpq.graph.vocabulary import ACTIVATIONS, MOVEMENTS, operator_name


@dataclass
class Codes:
    """A tensor in codes: real bytes, as many as its codes take."""

    packed: Tensor
    shape: torch.Size
    bits: int
    reader: fx.Node | None = None

    @classmethod
    def of(cls, tensor: Tensor, bits: int) -> Codes:
        size = -(-tensor.numel() * bits // 8)
        return cls(torch.zeros(size, dtype=torch.uint8), tensor.shape, bits)


def plain(value: object) -> object:
    return torch.zeros(value.shape) if isinstance(value, Codes) else value


def fuse(graph: fx.GraphModule) -> fx.GraphModule:
    """Make one call of each fusion, which holds nothing that lies between its operators."""
    fused = copy_graph(graph)
    by_name = {node.name: node for node in fused.graph.nodes}
    for fusion in state_of(graph).fusions:
        nodes = [by_name[name] for name in fusion.nodes]
        outside = [n for node in nodes for n in node.all_input_nodes if n not in nodes]
        outside = list(dict.fromkeys(outside))
        calls = [(node, node.target, node.args) for node in nodes]

        def together(
            *values: object, calls: list = calls, outside: list[fx.Node] = outside
        ) -> object:
            known = dict(zip(outside, values, strict=True))
            for node, target, args in calls:
                known[node] = target(*fx.node.map_arg(args, known.__getitem__))
            return known[node]

        with fused.graph.inserting_after(nodes[-1]):
            call = fused.graph.call_function(together, tuple(outside))
        call.meta = dict(nodes[-1].meta)
        nodes[-1].replace_all_uses_with(call)
        for node in reversed(nodes):
            fused.graph.erase_node(node)
    fused.recompile()
    return fused


class Machine(fx.Interpreter):
    """Runs one plan on one sample, keeps tensors in codes as bytes, and weighs what it keeps.

    A value is freed once the last node that takes it has run, by the interpreter itself.
    """

    def __init__(
        self, graph: fx.GraphModule, choices: Mapping[str, str], through: frozenset[object]
    ) -> None:
        super().__init__(fuse(graph))
        self.peak, self.through = 0, through
        self.bits: dict[str, int | None] = {}
        for group in state_of(graph).groups:
            precision = Precision.parse(choices[group.name])
            for name in group.activation_quantizers:
                self.bits[name] = precision.activation_bits
        inputs = state_of(graph).example
        self.waiting = {
            node: leaf[:1].clone() if isinstance(leaf, Tensor) else leaf
            for node, leaf in zip(
                self.module.graph.find_nodes(op="placeholder"), inputs, strict=True
            )
        }
        for node, leaf in self.waiting.items():
            self.waiting[node] = self.stored(node, leaf)
        self.run(*self.waiting.values(), enable_io_processing=False)

    def run_node(self, n: fx.Node) -> object:
        values = {source: self.env[source] for source in n.all_input_nodes}
        if n.op == "output":
            return super().run_node(n)
        if n.op == "placeholder":
            result = self.waiting.pop(n)
        elif n.op == "call_module" and str(n.target) in self.bits:
            (result,) = values.values()
            bits = self.bits[str(n.target)]
            is_written = isinstance(result, Codes) and result.reader is n
            if bits is not None and not is_written:
                result = Codes.of(plain(result), bits)
        elif n.op == "call_function" and any(isinstance(v, Codes) for v in values.values()):
            result = self.on_codes(n, values)
        else:
            result = super().run_node(n)
        if n.op == "call_function" and not self.is_view(n):
            result = self.stored(n, result)
            self.overwrite(n, values)
        if self.is_computed(n):
            self.weigh(result)
        return result

    def on_codes(self, node: fx.Node, values: dict[fx.Node, object]) -> object:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: plain(values[n]))
        result = node.target(*args, **kwargs)
        moves = operator_name(node) in MOVEMENTS or node.target in self.through
        if not (moves and len(values) == 1):
            return result
        (codes,) = values.values()
        if self.is_view(node):
            return Codes(codes.packed, result.shape, codes.bits, codes.reader)
        return Codes.of(result, codes.bits)

    def stored(self, node: fx.Node, result: object) -> object:
        """In codes at once, if a quantizer alone reads it."""
        readers = self.readers(node)
        if isinstance(result, Tensor) and len(readers) == 1:
            bits = self.bits.get(str(readers[0].target))
            if bits is not None:
                result = Codes.of(result, bits)
                result.reader = readers[0]
        return result

    def overwrite(self, node: fx.Node, values: dict[fx.Node, object]) -> None:
        """Free the floats that an activation function reads before what it writes is weighed."""
        if operator_name(node) not in ACTIVATIONS:
            return
        (source,) = values
        if isinstance(values[source], Codes):
            return
        while self.is_view(source):
            source = source.all_input_nodes[0]
        fits = source.meta["example_shape"].numel() == node.meta["example_shape"].numel()
        if source.op == "call_function" and fits and self.readers(source) == [node]:
            pending = [source]
            while pending:
                view = pending.pop()
                self.env[view] = None
                pending += [user for user in view.users if user is not node]

    def is_view(self, node: fx.Node) -> bool:
        """By what ATen says of an operator, not by where a result lies."""
        if node.op == "call_module":
            return self.bits.get(str(node.target), 8) is None
        return getattr(node.target, "is_view", False)

    def readers(self, node: fx.Node) -> list[fx.Node]:
        """What reads a value, past views."""
        found: list[fx.Node] = []
        for user in node.users:
            found += self.readers(user) if self.is_view(user) else [user]
        return list(dict.fromkeys(found))

    def weigh(self, result: object) -> None:
        kept = [value for node, value in self.env.items() if self.is_computed(node)]
        sizes = {}
        for value in (*kept, *self.waiting.values(), result):
            tensor = value.packed if isinstance(value, Codes) else value
            if isinstance(tensor, Tensor):
                sizes[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        self.peak = max(self.peak, sum(sizes.values()))

    def is_computed(self, node: fx.Node) -> bool:
        return node.op in {"placeholder", "call_function"} or str(node.target) in self.bits


@pytest.fixture(scope="session")
def most_held() -> Callable[[fx.GraphModule, Mapping[str, str], TargetRules], int]:
    """Runs a prepared graph for a plan; returns the most bytes that were kept at once."""

    def run(graph: fx.GraphModule, choices: Mapping[str, str], rules: TargetRules) -> int:
        return Machine(graph, choices, rules.through).peak

    return run
