"""Products that the user asks to quantize: found, with attention taken apart where need be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import fx

from fxmpq.errors import PrecisionError
from fxmpq.formats import Precision
from fxmpq.graph.attention import TakenApart, settle_attention, take_attention_apart
from fxmpq.graph.layers import place_of
from fxmpq.graph.products import PRODUCT, find_products
from fxmpq.graph.rules import TargetRules
from fxmpq.graph.state import LeftFloat, Product


@dataclass(frozen=True)
class AskedProducts:
    """The products that get groups, and those that attention stays fused around.

    Args:
        products: In graph order.
        fused: Names of products inside attention that stays fused, which patterns may match.
    """

    products: tuple[Product, ...] = ()
    fused: tuple[str, ...] = ()

    def without(self, left: Sequence[LeftFloat], graph: fx.GraphModule) -> list[LeftFloat]:
        """What stays float besides these products.

        Args:
            left: Every product of matrices in the graph, as `find_layers` lists it.
            graph: Where the products are.
        """
        nodes = {product.node for product in self.products}
        taken = {place_of(node) for node in graph.graph.nodes if node.name in nodes}
        return [entry for entry in left if entry.name not in taken]


NO_PRODUCTS = AskedProducts()
"""Where the user asks for none."""


def ask_products(
    graph: fx.GraphModule,
    rules: TargetRules,
    candidates: Sequence[Precision],
    keep: Mapping[str, Precision],
    exclude: Sequence[str],
) -> AskedProducts:
    """Find the products to quantize, in place on the graph: it takes attention apart for them.

    Attention of which both products stay float, by `keep` or `exclude`, stays fused.

    Args:
        graph: A canonical graph; changed in place.
        rules: The target's.
        candidates: What the user wants to choose from.
        keep: Pattern on names to the one precision that is wanted there.
        exclude: Patterns of what stays float.

    Returns:
        The products, and the names of those in fused attention.

    Raises:
        PrecisionError: If the target has no quantized product of two activations, or no
            candidate has a format for activations.
    """
    if PRODUCT not in rules.operators:
        raise PrecisionError(
            f"target {rules.name!r} has no quantized product of two activations; leave products "
            f"out. It runs {rules.describe()}"
        )
    wanted = [*candidates, *keep.values()]
    if all(entry.activation is None for entry in wanted):
        asked = ", ".join(str(entry) for entry in wanted)
        raise PrecisionError(
            f"products=True quantizes activations, and none of {asked} does; give a candidate "
            "that does, as 'w4a8', or 'a8' for products alone"
        )
    taken = take_attention_apart(graph)
    found = {product.node: product for product in find_products(graph)}
    fused: dict[str, None] = {}

    def stays_apart(entry: TakenApart) -> bool:
        parts = [found[node.name] for node in (entry.scores, entry.context) if node.name in found]
        stays = any(not _stays_float(part.name, keep, exclude) for part in parts)
        fused.update({} if stays else {part.name: None for part in parts})
        return stays

    settle_attention(graph, taken, stays_apart)
    products = tuple(product for product in found.values() if product.name not in fused)
    return AskedProducts(products, tuple(fused))


def _stays_float(name: str, keep: Mapping[str, Precision], exclude: Sequence[str]) -> bool:
    if any(fnmatchcase(name, pattern) for pattern in exclude):
        return True
    pins = [entry for pattern, entry in keep.items() if fnmatchcase(name, pattern)]
    return bool(pins) and pins[-1].is_float
