"""Products of two activations as operators on the codes of both, and finding them again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir
import torch
from torch import fx

from fxmpq.graph.products import PRODUCTS, product_operands
from fxmpq.graph.state import Product, node_shape, state_of
from fxmpq.quantizers.ranges import ActivationRange
from fxmpq.targets.onnxruntime import operators  # noqa: F401  (registers torch.ops.fxmpq)
from fxmpq.targets.onnxruntime.product_masks import apply_masks_as_terms

aten = torch.ops.aten

_LARGEST_SUM = 2.0**31
"""What an `int32` accumulator holds at most."""

Codes = Mapping[fx.Node, tuple[fx.Node, ActivationRange]]


def products_of(graph: fx.GraphModule) -> dict[str, Product]:
    """The products that the plan of a graph quantizes, by node name, in graph order."""
    state = state_of(graph)
    found = {
        product.node: product
        for group in state.groups
        if group.candidate(state.choices[group.name]).activation is not None
        for product in group.products
    }
    return {node.name: found[node.name] for node in graph.graph.nodes if node.name in found}


def rewrite_products(
    graph: fx.GraphModule, products: Mapping[str, Product], codes_of: Codes
) -> None:
    """Replace quantized products by `integer_product`, in place.

    What `addmm` and `baddbmm` add is added behind it, `alpha * product + beta * addend`. A number
    that a product is multiplied by becomes part of its scales, and a mask on it a term.

    Args:
        graph: A graph being rewritten, whose operands are in codes.
        products: From `products_of` on the planned graph.
        codes_of: By the node whose value is back in real numbers, its codes and their grid.
    """
    for node in [node for node in graph.graph.nodes if node.name in products]:
        (left, x), (right, y) = (codes_of[operand] for operand in product_operands(node))
        has_addend = PRODUCTS[node.target][0] == 1
        factor = 1.0 if has_addend else _take_factor(graph.graph, node)
        grids = (left, x.scale * factor, x.zero_point, right, y.scale, y.zero_point)
        with graph.graph.inserting_before(node):
            result = graph.graph.call_function(torch.ops.fxmpq.integer_product.default, grids)
            if has_addend:
                result = _added(graph.graph, node, result)
        node.replace_all_uses_with(result)
        sizes = node_shape(node)
        if sizes is not None and not has_addend:
            largest = _LARGEST_SUM * x.scale * factor * y.scale
            apply_masks_as_terms(graph.graph, result, sizes, largest)
        graph.graph.erase_node(node)


def _take_factor(graph: fx.Graph, node: fx.Node) -> float:
    """The number that a product alone is multiplied by, as attention's scores are; drops that."""
    reader = next(iter(node.users), None)
    if reader is None or len(node.users) > 1 or reader.target is not aten.mul.Tensor:
        return 1.0
    factor = reader.args[1]
    if not isinstance(factor, float) or factor <= 0 or reader.kwargs:
        return 1.0
    reader.replace_all_uses_with(node)
    graph.erase_node(reader)
    return factor


def _added(graph: fx.Graph, node: fx.Node, product: fx.Node) -> fx.Node:
    """`alpha * product + beta * addend` of a call that adds."""
    addend = node.args[0]
    terms = []
    for value, factor in ((product, "alpha"), (addend, "beta")):
        scaled = node.kwargs.get(factor, 1)
        is_one = scaled == 1
        terms.append(value if is_one else graph.call_function(aten.mul.Tensor, (value, scaled)))
    return graph.call_function(aten.add.Tensor, tuple(terms))


def name_products(model: ir.Model, products: Sequence[Product]) -> None:
    """Name the nodes of an exported model that multiply activations, in place.

    Kernels keep the names of their nodes, so that a product is known again in what the runtime
    makes of the model.

    Args:
        model: As exported, each product a `MatMulIntegerToFloat` of two computed tensors.
        products: In graph order, which is that of the model.
    """
    found = [
        node
        for node in model.graph
        if node.op_type == "MatMulIntegerToFloat" and not is_stored(node)
    ]
    for node, product in zip(found, products, strict=True):
        node.name = product_node(product)


def is_stored(node: ir.Node) -> bool:
    """Whether the second operand of a product is a stored weight."""
    second = node.inputs[1]
    return second is not None and second.is_initializer()


def product_node(product: Product) -> str:
    """The name of a product's node."""
    return f"product_{product.name}"
