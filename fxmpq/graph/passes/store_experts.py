"""Store the weights of experts and of batched products as matrices, an output channel a row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from fxmpq.graph import experts  # noqa: F401  (registers torch.ops.fxmpq)
from fxmpq.graph.attributes import get_tensor, replace_stored
from fxmpq.graph.constants import constant_nodes
from fxmpq.graph.inserting import Inserter

aten = torch.ops.aten
own = torch.ops.fxmpq

# Multiplies rows that are sorted by expert by weights `[experts, in, out]`. PyTorch's own operator
# of this kind, `_grouped_mm`, exports in bfloat16 only, which is not quantized.
_GROUPED = "transformers::grouped_mm_fallback"
_BATCHED: Mapping[object, int] = {
    aten.bmm.default: 0,
    aten.matmul.default: 0,
    aten.baddbmm.default: 1,
}


@dataclass(frozen=True)
class _Product:
    """A product of an activation and several weights.

    Args:
        node: The call.
        factor: What it is multiplied by.
        stored: The stored weight, or `None` where the factor is computed of stored tensors.
        form: `plain`, `turned` or `behind`; see `batched_linear`.
    """

    node: fx.Node
    factor: fx.Node
    stored: fx.Node | None
    form: str


def store_experts(graph: fx.GraphModule) -> int:
    """Replace products with stored weights of three dimensions, in place on the graph.

    A mixture of experts of transformers becomes `fxmpq.grouped_linear`, a batched product (`bmm`,
    `baddbmm` and `matmul` with a weight of three dimensions) `fxmpq.batched_linear`. Their weight
    is stored as one matrix `[experts * out, in]`, so that each output channel of each expert is a
    row, as in every other layer. The operators see it as the model had it, so the graph gives the
    same bits. Weights that something else reads too, or that are not of `float32`, stay.

    Args:
        graph: A graph of ATen operators; changed in place.

    Returns:
        How many products were replaced.
    """
    constants = constant_nodes(graph)
    found: dict[fx.Node | None, list[_Product]] = {}
    for node in graph.graph.nodes:
        product = _product(graph, node, constants)
        if product is not None:
            found.setdefault(product.stored, []).append(product)
    replaced = 0
    for stored, products in found.items():
        if stored is not None:
            if not _is_read_alike(stored, products):
                continue
            experts_count = len(get_tensor(graph, str(stored.target)))
            _store_matrix(graph, stored, is_turned=products[0].form == "turned")
        for product in products:
            count = experts_count if stored is not None else len(product.factor.meta["val"])
            _replace(graph, product, count)
            replaced += 1
    if replaced:
        graph.recompile()
    return replaced


def _product(
    graph: fx.GraphModule, node: fx.Node, constants: Mapping[fx.Node, fx.Node]
) -> _Product | None:
    """Read a call; `None` if it is no product of an activation and several stored weights."""
    operands = _operands(node)
    if operands is None:
        return None
    first, second = operands
    is_behind = first in constants and node.target in _BATCHED and not _BATCHED[node.target]
    source, factor = (second, first) if is_behind else (first, second)
    if factor not in constants or source in constants or not _is_stack(factor):
        return None
    if is_behind:
        # A stack times a vector has no rows.
        fits = _is_stored(factor) and source.meta["val"].dim() >= 2
        return _Product(node, factor, factor, "behind") if fits else None
    if _is_stored(factor):
        return _Product(node, factor, factor, "turned")
    inner = _untransposed(factor)
    if inner is not None and _is_stored(inner):
        return _Product(node, factor, inner, "plain")
    return _Product(node, factor, None, "turned")


def _operands(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """What a product multiplies."""
    if node.op != "call_function" or node.kwargs:
        return None
    target = node.target
    is_grouped = isinstance(target, torch._ops.OpOverload) and target._schema.name == _GROUPED
    if is_grouped and len(node.args) == 3:
        first, second = node.args[:2]
        is_rows = isinstance(first, fx.Node) and first.meta["val"].dim() == 2
    elif target in _BATCHED:
        place = _BATCHED[target]
        first, second = node.args[place : place + 2]
        is_rows = isinstance(first, fx.Node) and len(node.args) == place + 2
    else:
        return None
    if not is_rows or not isinstance(first, fx.Node) or not isinstance(second, fx.Node):
        return None
    return first, second


def _is_stack(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dim() == 3 and value.dtype is torch.float32


def _is_stored(node: fx.Node) -> bool:
    return node.op == "get_attr"


def _untransposed(node: fx.Node) -> fx.Node | None:
    """What a node is the transpose of in the last two of three dimensions."""
    source = node.args[0] if node.op == "call_function" and node.args else None
    if not isinstance(source, fx.Node):
        return None
    if node.target is aten.transpose.int:
        axes = {axis % 3 for axis in node.args[1:3]}  # type: ignore[operator]
        return source if axes == {1, 2} else None
    if node.target is aten.permute.default:
        order = [axis % 3 for axis in node.args[1]]  # type: ignore[operator, union-attr]
        return source if order == [0, 2, 1] else None
    return source if node.target is aten.mT.default else None


def _is_read_alike(stored: fx.Node, products: list[_Product]) -> bool:
    """Whether nothing but these products reads a weight, all in the same layout."""
    factors = {product.factor for product in products}
    calls = {product.node for product in products}
    layouts = {product.form == "turned" for product in products}
    turns = stored.users.keys() - calls
    is_all = turns <= factors and all(turn.users.keys() <= calls for turn in turns)
    return is_all and len(layouts) == 1


def _store_matrix(graph: fx.GraphModule, node: fx.Node, *, is_turned: bool) -> None:
    tensor = get_tensor(graph, str(node.target)).detach()
    replace_stored(graph, node, (tensor.mT if is_turned else tensor).flatten(0, 1))


def _replace(graph: fx.GraphModule, product: _Product, count: int) -> None:
    """Put the operator of a product in its call's place."""
    node, weight = product.node, product.stored
    operands = _operands(node)
    assert operands is not None
    source = operands[1] if product.form == "behind" else operands[0]
    call = Inserter(graph, node)
    if weight is None:
        # `fold_constants` computes it once.
        turned = call(aten.transpose.int, product.factor, 1, 2)
        weight = call(aten.flatten.using_ints, turned, 0, 1)
    if node.target not in _BATCHED:
        is_turned = product.form == "turned"
        call.replace(own.grouped_linear.default, source, weight, node.args[2], is_turned)
    elif product.form == "behind":
        rows = call(aten.transpose.int, source, -2, -1)
        turned = call(own.batched_linear.default, rows, weight, None, count, product.form)
        call.replace(aten.transpose.int, turned, -2, -1)
    else:
        summand = node.args[0] if _BATCHED[node.target] else None
        call.replace(own.batched_linear.default, source, weight, summand, count, product.form)
    if product.factor is not product.stored and not product.factor.users:
        graph.graph.erase_node(product.factor)
