"""Attention: taking the fused operator apart, so that its two products can be quantized."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.fx.node import Argument

from fxmpq.graph.state import node_shape

aten = torch.ops.aten

_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
_VIEWS = frozenset({aten.view.default, aten._unsafe_view.default})
_TURNS = frozenset({aten.transpose.int, aten.permute.default})

_LEAST = torch.finfo(torch.float32).min
"""What scores are where a mask is `False`; its exponential is 0 beside any other."""

Shape = tuple[int | torch.SymInt, ...]


@dataclass(frozen=True)
class TakenApart:
    """Fused attention and what stands in its place.

    Args:
        fused: The fused call, which nothing reads any more.
        scores: The product of query and key.
        context: The product of attention weights and value.
        result: What readers read in the place of `fused`.
    """

    fused: fx.Node
    scores: fx.Node
    context: fx.Node
    result: fx.Node


def take_attention_apart(graph: fx.GraphModule) -> list[TakenApart]:
    """Write fused attention as product, scale, mask, softmax and product, in place on the graph.

    `attention(q, k, v) = softmax(scale * q k^T + mask) v`, with `scale = 1 / sqrt(d)` unless the
    call gives one. A boolean mask takes scores away where it is `False`, a causal one above the
    diagonal; a row that loses all of them gives zeros, as from the fused operator. Heads of keys
    and values that several queries share are repeated. The result agrees with the fused
    operator's to rounding, not bit for bit; all scores are in memory at once.

    Calls with dropout, or of other numbers than `float32`, stay as they are.

    Args:
        graph: A canonical graph; changed in place. The fused calls stay in it, unread.

    Returns:
        What was taken apart, in graph order; `settle_attention` decides each.

    Examples:
        >>> import fxmpq
        >>> class Attention(torch.nn.Module):
        ...     def forward(self, x):
        ...         return torch.nn.functional.scaled_dot_product_attention(x, x, x)
        >>> graph = fxmpq.trace(Attention(), torch.randn(2, 3, 4))
        >>> settle_attention(graph, take_attention_apart(graph), lambda entry: True)
        >>> [str(node.target) for node in graph.graph.find_nodes(op="call_function",
        ...     target=torch.ops.aten.matmul.default)]
        ['aten.matmul.default', 'aten.matmul.default']
    """
    fused = graph.graph.find_nodes(
        op="call_function", target=aten.scaled_dot_product_attention.default
    )
    taken = []
    for node in fused:
        call = _Call.of(node)
        if call is None:
            continue
        readers = list(node.users)
        found = _Parts(graph.graph, node).write(call)
        for reader in readers:
            reader.replace_input_with(node, found.result)
        taken.append(found)
    return taken


def settle_attention(
    graph: fx.GraphModule, taken: Iterable[TakenApart], stays_apart: Callable[[TakenApart], bool]
) -> None:
    """Drop the fused call of what stays apart, and the parts of what does not, in place.

    Args:
        graph: The graph that `take_attention_apart` changed.
        taken: What it returned.
        stays_apart: Whether one stays apart; the others are fused again, as they were.
    """
    for found in taken:
        if stays_apart(found):
            graph.graph.erase_node(found.fused)
            continue
        found.result.replace_all_uses_with(found.fused)
        _erase_from(graph.graph, found.result, until=found.fused)
    graph.recompile()


def _erase_from(graph: fx.Graph, last: fx.Node, until: fx.Node) -> None:
    """Erase the nodes behind `until` up to `last`, which nothing else reads, back to front."""
    node = last
    while node is not until:
        before = node.prev
        graph.erase_node(node)
        node = before


@dataclass(frozen=True)
class _Call:
    """The operands of a call that can be taken apart."""

    query: fx.Node
    key: fx.Node
    value: fx.Node
    mask: fx.Node | None
    is_causal: bool
    scale: float
    repeats: int

    @classmethod
    def of(cls, node: fx.Node) -> _Call | None:
        """Read a call; `None` if it has to stay fused."""
        found = {**dict(zip(_ARGUMENTS, node.args, strict=False)), **node.kwargs}
        operands = [found[name] for name in _ARGUMENTS[:3]]
        tensors = [
            arg for arg in operands if isinstance(arg, fx.Node) and _holds(arg, torch.float32)
        ]
        mask, scale = found.get("attn_mask"), found.get("scale")
        if len(tensors) != 3 or found.get("dropout_p", 0.0) != 0.0:
            return None
        query, key, value = tensors
        sizes, shared = node_shape(query), node_shape(key)
        if sizes is None or shared is None or isinstance(scale, fx.Node):
            return None
        assert mask is None or isinstance(mask, fx.Node)
        is_grouped = bool(found.get("enable_gqa", False)) and sizes[-3] != shared[-3]
        return cls(
            query,
            key,
            value,
            mask,
            bool(found.get("is_causal", False)),
            1 / math.sqrt(sizes[-1]) if scale is None else float(scale),  # type: ignore[arg-type]
            sizes[-3] // shared[-3] if is_grouped else 1,
        )


class _Parts:
    """Writes nodes one behind the other, with the notes that later steps read.

    Args:
        graph: Takes the nodes, behind the call.
        fused: The call whose place in the model they have.
    """

    def __init__(self, graph: fx.Graph, fused: fx.Node) -> None:
        self._graph = graph
        self._fused = fused
        self._last = fused

    def write(self, call: _Call) -> TakenApart:
        """Write everything a call computes."""
        key, value = call.key, call.value
        if call.repeats > 1:
            key, value = (self._repeated(node, call.repeats) for node in (key, value))
        turned = self._node(
            "key_t", aten.transpose.int, (key, -2, -1), lambda s: (*s[:-2], s[-1], s[-2]), key
        )
        scores = self._node(
            "scores",
            aten.matmul.default,
            (call.query, turned),
            lambda result, right: (*result[:-1], right[-1]),
            self._fused,
            turned,
        )
        weighed = self._like(scores, "scaled", aten.mul.Tensor, (scores, call.scale))
        mask = self._causal(scores) if call.is_causal else call.mask
        is_added = mask is not None and not _holds(mask, torch.bool)
        if mask is not None and is_added:
            weighed = self._like(scores, "masked", aten.add.Tensor, (weighed, mask))
        elif mask is not None:
            filled = (mask, weighed, _LEAST)
            weighed = self._like(scores, "masked", aten.where.ScalarOther, filled)
        # A mask may leave nothing of a row: the result is zero there, and not NaN.
        softmax = aten._safe_softmax.default if is_added else aten.softmax.int
        weights = self._like(scores, "attention", softmax, (weighed, -1))
        context = self._like(self._fused, "context", aten.matmul.default, (weights, value))
        result = context
        if call.mask is not None and not is_added:
            result = self._without_empty_rows(context, call.mask)
        return TakenApart(self._fused, scores, context, self._in_layout(result))

    def _without_empty_rows(self, context: fx.Node, mask: fx.Node) -> fx.Node:
        """Zeros where a boolean mask leaves nothing; told from the mask, which is small."""
        any_left = (mask, -1, True)
        left = self._node("left", aten.any.dim, any_left, lambda sizes: (*sizes[:-1], 1), mask)
        return self._like(context, "result", aten.where.ScalarOther, (left, context, 0.0))

    def _causal(self, scores: fx.Node) -> fx.Node:
        """`True` on and below the diagonal of one matrix of scores."""
        one = scores
        for _ in range(len(_sizes(scores)) - 2):
            one = self._node("one", aten.select.int, (one, 0, 0), lambda s: s[1:], one)
        options: dict[str, Argument] = {"dtype": torch.bool}
        ones = self._like(one, "ones", aten.ones_like.default, (one,), options)
        return self._like(ones, "causal", aten.tril.default, (ones,))

    def _repeated(self, node: fx.Node, repeats: int) -> fx.Node:
        return self._node(
            "repeated",
            aten.repeat_interleave.self_int,
            (node, repeats, -3),
            lambda s: (*s[:-3], s[-3] * repeats, *s[-2:]),
            node,
        )

    def _in_layout(self, context: fx.Node) -> fx.Node:
        """The result in the fused operator's layout, where a reader views it turned round."""
        for turn in self._fused.users:
            if turn.target in _TURNS and any(reader.target in _VIEWS for reader in turn.users):
                there, back = _axes(turn, len(_sizes(context)))
                rows = self._turned(context, there)
                rows = self._like(rows, "rows", aten.contiguous.default, (rows,))
                return self._turned(rows, back)
        return context

    def _turned(self, node: fx.Node, axes: Sequence[int]) -> fx.Node:
        return self._node(
            "rows",
            aten.permute.default,
            (node, list(axes)),
            lambda shape: tuple(shape[axis] for axis in axes),
            node,
        )

    def _like(
        self,
        other: fx.Node,
        name: str,
        target: Callable[..., object],
        arguments: tuple[Argument, ...],
        options: dict[str, Argument] | None = None,
    ) -> fx.Node:
        """Write a node whose result has the shape of another's."""
        return self._node(name, target, arguments, lambda shape: shape, other, options=options)

    def _node(
        self,
        name: str,
        target: Callable[..., object],
        arguments: tuple[Argument, ...],
        shape: Callable[..., Shape],
        *sources: fx.Node,
        options: dict[str, Argument] | None = None,
    ) -> fx.Node:
        """Write a node behind the last one; its shape is a function of its sources'."""
        with self._graph.inserting_after(self._last):
            node = self._graph.create_node("call_function", target, arguments, options or {}, name)
        stack = self._fused.meta.get("nn_module_stack")
        node.meta = {} if stack is None else {"nn_module_stack": stack}
        sizes = shape(*map(_sizes, sources))
        node.meta["example_shape"] = torch.Size(int(size) for size in sizes)
        values = [source.meta.get("val") for source in sources]
        tensors = [value for value in values if isinstance(value, Tensor)]
        if len(tensors) == len(sources):
            made = shape(*(value.shape for value in tensors))
            dtype = torch.bool if "dtype" in (options or {}) else tensors[0].dtype
            node.meta["val"] = tensors[0].new_empty(made, dtype=dtype)
        self._last = node
        return node


def _sizes(node: fx.Node) -> torch.Size:
    return node_shape(node) or torch.Size()


def _axes(turn: fx.Node, rank: int) -> tuple[list[int], list[int]]:
    """The order of axes that a transpose or permutation makes, and the one that undoes it."""
    order = list(range(rank))
    if turn.target is aten.transpose.int:
        one, other = (int(axis) % rank for axis in turn.args[1:3])  # type: ignore[arg-type]
        order[one], order[other] = order[other], order[one]
    else:
        order = [int(axis) % rank for axis in turn.args[1]]  # type: ignore[union-attr, arg-type]
    return order, sorted(range(rank), key=order.__getitem__)


def _holds(node: fx.Node, dtype: torch.dtype) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dtype is dtype
