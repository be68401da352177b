"""Finding products of two activations."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx

from fxmpq.graph.batches import batch_size
from fxmpq.graph.findings import Join
from fxmpq.graph.layers import float_matmul_macs, place_of
from fxmpq.graph.operators import OPERATORS, argument
from fxmpq.graph.state import Layer, Member, Product, state_of
from fxmpq.graph.vocabulary import MOVEMENTS, operator_name

aten = torch.ops.aten

PRODUCTS: Mapping[object, tuple[int, int]] = {
    aten.matmul.default: (0, 1),
    aten.mm.default: (0, 1),
    aten.bmm.default: (0, 1),
    aten.addmm.default: (1, 2),
    aten.baddbmm.default: (1, 2),
}
"""Operators that multiply two matrices, and the positions of their operands."""

PRODUCT = "matmul"
"""The kind of all of them, a key of a target's rules."""

_NUMBER = re.compile(r"_\d+$")


def find_products(graph: fx.GraphModule) -> tuple[Product, ...]:
    """Find every product of two activations that can be quantized.

    Both operands are computed matrices, or stacks of them, of `float32`. A product is named
    after the module that it is in and its operator, as `encoder.layer.0.attention.matmul`;
    attention that was taken apart has `scores` and `context`. Further ones of a name get `#2`,
    `#3` and so on.

    Args:
        graph: A canonical graph.

    Returns:
        In graph order, each with its multiply-accumulates per sample.

    Examples:
        >>> import fxmpq
        >>> class Similarity(torch.nn.Module):
        ...     def forward(self, x):
        ...         return x @ x.transpose(1, 2)
        >>> graph = fxmpq.trace(Similarity(), torch.randn(2, 3, 4))
        >>> find_products(graph)
        (Product(name='matmul', node='matmul', macs=36, kind='matmul'),)
    """
    samples = batch_size(state_of(graph).example)
    names: Counter[str] = Counter()
    found = []
    stored: set[fx.Node] = set()
    for node in graph.graph.nodes:
        if _is_stored(node, stored):
            stored.add(node)
        operands = product_operands(node)
        if not operands or any(one in stored or not _is_matrix(one) for one in operands):
            continue
        name = product_name(node)
        names[name] += 1
        name = name if names[name] == 1 else f"{name}#{names[name]}"
        macs = float_matmul_macs(node) // samples
        found.append(Product(name, node.name, macs, PRODUCT))
    return tuple(found)


def product_operands(node: fx.Node) -> tuple[fx.Node, ...]:
    """The two operands of a product of matrices; none for every other node.

    Args:
        node: Of a canonical or prepared graph.
    """
    found = [
        node.args[position]
        for position in PRODUCTS.get(node.target, ())
        if position < len(node.args)
    ]
    operands = tuple(entry for entry in found if isinstance(entry, fx.Node))
    return operands if len(operands) == 2 else ()


def product_name(node: fx.Node) -> str:
    """Name of a product, from its place in the model: its node's without the number."""
    path = place_of(node).removesuffix(node.name)
    return path + _NUMBER.sub("", node.name)


def shared_operands(graph: fx.GraphModule, members: Sequence[Member]) -> list[Join]:
    """Join each product with what reads one of its operands: it is stored once, in one format.

    Args:
        graph: A canonical graph.
        members: Layers and products, in graph order.
    """
    nodes = {node.name: node for node in graph.graph.nodes}
    first: dict[fx.Node, Member] = {}
    joins: dict[Join, None] = {}
    for member in members:
        node = nodes[member.node]
        read = product_operands(node)
        if isinstance(member, Layer):
            operator = OPERATORS[node.target]
            source = argument(node, operator.input) if operator.quantizes_input else None
            read = (source,) if isinstance(source, fx.Node) else ()
        for value in read:
            other = first.setdefault(value, member)
            if other is not member and isinstance(other, Product) | isinstance(member, Product):
                joins[Join("shared_input", member.name, other.name)] = None
    return list(joins)


def _is_stored(node: fx.Node, stored: set[fx.Node]) -> bool:
    """Whether a tensor is a stored one, however repeated or reordered."""
    is_moved = operator_name(node) in MOVEMENTS and node.args[0] in stored
    return node.op == "get_attr" or is_moved


def _is_matrix(node: fx.Node) -> bool:
    """Whether a tensor holds matrices of `float32`."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dtype is torch.float32 and value.dim() >= 2
