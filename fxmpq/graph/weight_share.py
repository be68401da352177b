"""Which share of the weights in products and convolutions can be quantized, and what cannot."""

from __future__ import annotations

import operator as python_operator
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import Tensor, fx

from fxmpq.graph.attributes import get_tensor
from fxmpq.graph.constants import constant_nodes
from fxmpq.graph.layers import find_layers, float_reason, place_of
from fxmpq.graph.operators import FLOAT_MATMULS, argument, operator_of
from fxmpq.graph.state import GraphState, require

# Positions of what other operators multiply; a list of tensors there counts each of them.
_FACTORS: Mapping[str, tuple[int, ...]] = {
    "aten::matmul": (0, 1),
    "aten::mm": (0, 1),
    "aten::bmm": (0, 1),
    "aten::mv": (0, 1),
    "aten::dot": (0, 1),
    "aten::inner": (0, 1),
    "aten::tensordot": (0, 1),
    "aten::_grouped_mm": (0, 1),
    "transformers::grouped_mm_fallback": (0, 1),
    "aten::addmm": (1, 2),
    "aten::addbmm": (1, 2),
    "aten::addmv": (1, 2),
    "aten::baddbmm": (1, 2),
    "aten::bilinear": (0, 1, 2),
    "aten::einsum": (1,),
    "aten::scaled_dot_product_attention": (0, 1, 2),
    "aten::convolution": (1,),
    "aten::conv_transpose1d": (1,),
    "aten::conv_transpose2d": (1,),
    "aten::conv_transpose3d": (1,),
    "aten::lstm": (2,),
    "aten::gru": (2,),
    "aten::rnn_tanh": (2,),
    "aten::rnn_relu": (2,),
    "aten::lstm_cell": (2, 3),
    "aten::gru_cell": (2, 3),
    "aten::rnn_tanh_cell": (2, 3),
    "aten::rnn_relu_cell": (2, 3),
}

# Operators that only select, repeat or reorder values.
_MOVEMENTS = frozenset(
    {
        "aten::view",
        "aten::reshape",
        "aten::_unsafe_view",
        "aten::flatten",
        "aten::unflatten",
        "aten::view_as",
        "aten::reshape_as",
        "aten::squeeze",
        "aten::unsqueeze",
        "aten::expand",
        "aten::expand_as",
        "aten::repeat",
        "aten::repeat_interleave",
        "aten::tile",
        "aten::broadcast_to",
        "aten::permute",
        "aten::transpose",
        "aten::t",
        "aten::numpy_T",
        "aten::mT",
        "aten::mH",
        "aten::adjoint",
        "aten::movedim",
        "aten::swapaxes",
        "aten::swapdims",
        "aten::contiguous",
        "aten::clone",
        "aten::alias",
        "aten::detach",
        "aten::slice",
        "aten::select",
        "aten::narrow",
        "aten::split",
        "aten::split_with_sizes",
        "aten::chunk",
        "aten::unbind",
        "aten::index",
        "aten::index_select",
        "aten::gather",
        "aten::cat",
        "aten::concat",
        "aten::stack",
        "aten::flip",
        "aten::roll",
        "aten::to",
        "aten::_to_copy",
        "aten::constant_pad_nd",
        "aten::pad",
    }
)


@dataclass(frozen=True)
class WeightShare:
    """How much of the weights in matrix products and convolutions can be quantized.

    Args:
        quantizable: Elements of stored weights of layers that fxmpq quantizes.
        total: Elements of all stored weights in matrix products and convolutions.
        left: Name, elements and reason of each that cannot be quantized, in graph order.
    """

    quantizable: int
    total: int
    left: tuple[tuple[str, int, str], ...]

    @property
    def fraction(self) -> float:
        """`quantizable / total`; 1 where there is nothing to quantize."""
        return self.quantizable / self.total if self.total else 1.0


def weight_share(graph: fx.GraphModule) -> WeightShare:
    """Count the weights that sit in matrix products and convolutions.

    A weight is a stored floating-point tensor of two or more values that reaches a factor of a
    product or convolution through operators that move values only (views, transposes, slices,
    gathers, casts), or a result of stored tensors alone that does. Each counts once, with all
    its elements. Summands (biases, positions, masks), look-up tables that are only read row by
    row, and a stored tensor that a layer with a stored weight of its own takes as its input
    (a learned query) are none.

    Args:
        graph: From `trace`, or from `prepare` for what a target quantizes.

    Returns:
        The counts; `quantizable` holds those that are a layer's weight.

    Raises:
        FxmpqError: If the graph did not come from `trace`.

    Examples:
        >>> from fxmpq.graph.trace import trace
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LSTM(8, 2))
        >>> share = weight_share(trace(model, torch.randn(2, 4)))
        >>> share.quantizable, share.total
        (32, 112)
        >>> share.left[0]
        ('1.weight_ih_l0', 64, 'recurrent layers are computed in float')
    """
    state = require(graph, stage="traced")
    constants = constant_nodes(graph)
    layers = _quantizable(graph, state)
    sizes: dict[str, int] = {}
    reasons = _known_reasons(state)
    for node in graph.graph.nodes:
        for factor in _factors(node):
            for source in _sources(factor):
                value = _value(graph, source) if source in constants else None
                if not _is_weight(value):
                    continue
                is_stored = source.op == "get_attr"
                name = str(source.target) if is_stored else place_of(source)
                sizes[name] = value.numel()
                reasons.setdefault(name, _reason(node, constants, is_stored=is_stored))
    left = tuple((name, size, reasons[name]) for name, size in sizes.items() if name not in layers)
    total = sum(sizes.values())
    return WeightShare(total - sum(size for _, size, _ in left), total, left)


def _quantizable(graph: fx.GraphModule, state: GraphState) -> set[str]:
    """Names of weights that have a quantizer, or in a graph without quantizers may get one."""
    if state.target is None:
        return {layer.weight for layer in find_layers(graph).layers}
    layers = (layer for group in state.groups for layer in group.layers)
    return {layer.weight for layer in layers if layer.weight_quantizer is not None}


def _known_reasons(state: GraphState) -> dict[str, str]:
    """Why layers of a prepared graph stay float, by the names of their weights."""
    named = {entry.name: entry.reason for entry in state.left_float}
    layers = (layer for group in state.groups for layer in group.layers)
    return {layer.weight: named[layer.name] for layer in layers if layer.name in named}


def _factors(node: fx.Node) -> Iterator[fx.Node]:
    """What a node multiplies as a matrix or convolution; a layer's own input is no weight."""
    operator = operator_of(node)
    positions = _FACTORS.get(_name(node), ())
    if operator is not None:
        positions = (operator.weight,) if operator.quantizes_input else ()
    for position in positions:
        given = argument(node, position)
        found = list(given) if isinstance(given, (tuple, list)) else [given]
        if len(found) > 1 and node.target is not torch.ops.aten.einsum.default:
            # A recurrent layer's list holds biases too.
            found = [entry for entry in found if _dimensions(entry) > 1]
        yield from (entry for entry in found if isinstance(entry, fx.Node))


def _name(node: fx.Node) -> str:
    """An operator's name without its overload."""
    target = node.target
    return target._schema.name if isinstance(target, torch._ops.OpOverload) else ""


def _sources(node: fx.Node) -> Iterator[fx.Node]:
    """Where a tensor's values come from, past operators that only move them."""
    waiting, seen = [node], {node}
    while waiting:
        node = waiting.pop()
        moves = node.target is python_operator.getitem or node.op == "call_module"
        if not moves and _name(node) not in _MOVEMENTS:
            yield node
            continue
        # A gather's and a slice's further arguments are positions; those of a joint are values.
        moved = node.args[0]
        for entry in moved if isinstance(moved, (tuple, list)) else (moved,):
            if isinstance(entry, fx.Node) and entry not in seen:
                seen.add(entry)
                waiting.append(entry)


def _dimensions(node: object) -> int:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value.dim() if isinstance(value, Tensor) else 0


def _is_weight(value: object) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and value.is_floating_point() and value.numel() > 1


def _value(graph: fx.GraphModule, node: fx.Node) -> object:
    """A stored tensor, or what the export recorded of a computed one."""
    is_stored = node.op == "get_attr"
    return get_tensor(graph, str(node.target)) if is_stored else node.meta.get("val")


def _reason(product: fx.Node, constants: Collection[fx.Node], *, is_stored: bool) -> str:
    if not is_stored:
        return "it is computed from stored tensors, not stored"
    operator = operator_of(product)
    if operator is not None:
        return "it is moved on the way to its layer, not read as it is stored"
    if product.target in FLOAT_MATMULS:
        return float_reason(product, constants)
    return f"{product.target} has no quantized form"
