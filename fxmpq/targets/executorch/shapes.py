"""Shapes and paddings in forms that ExecuTorch lowers as they are."""

from __future__ import annotations

import sys

import torch
from torch import Tensor, fx

from fxmpq.graph.batches import fixed_size

aten = torch.ops.aten
quantized_decomposed = torch.ops.quantized_decomposed


def flatten_rows(graph: fx.GraphModule) -> None:
    """Let linear layers whose rows find their ranges read four dimensions as three, in place.

    XNNPACK keeps what convolutions and pooling compute with the channels last, and reorders it for
    a linear layer: ExecuTorch 1.5 does so between the codes and the layer, which then is on none.
    In front of a reshape it does so before there are codes. Ranges and codes are of one tensor.

    Args:
        graph: In the form of `to_decomposed`, where layers of rows are `linear`.
    """
    chosen = quantized_decomposed.choose_qparams_per_token_asymmetric.default
    for node in list(graph.graph.find_nodes(op="call_function", target=chosen)):
        rows = quantized_decomposed.quantize_per_token.default
        readers = (user for scale in node.users for user in scale.users)
        codes = list(dict.fromkeys(user for user in readers if user.target is rows))
        linears = [layer for one in codes for real in one.users for layer in real.users]
        source, spread = node.args[0], _spread_of(linears)
        if spread is not None:
            with graph.graph.inserting_before(node):
                source = graph.graph.call_function(aten.flatten.using_ints, (source, 1, 2))
            for layer in linears:
                _unflatten(graph, layer, spread)
        for reader in (node, *codes):
            reader.update_arg(0, source)


def pad_by_slices(graph: fx.GraphModule) -> None:
    """Compute circular padding by slices and `cat`, in place.

    Lowering PyTorch's own form of it fixes free sizes to those of the example.

    Args:
        graph: Changed; what it computes stays the same to the last bit.
    """
    for node in list(graph.graph.find_nodes(op="call_function", target=aten.pad.default)):
        source, widths, *mode = node.args
        if mode[:1] == ["circular"] and min(widths) >= 0:
            with graph.graph.inserting_before(node):
                for place, left in enumerate(widths[::2]):
                    source = _wrapped(graph, source, -1 - place, left, widths[2 * place + 1])
            node.replace_all_uses_with(source)
            graph.graph.erase_node(node)


def _spread_of(linears: list[fx.Node]) -> list[int] | None:
    """The middle sizes of what layers return, -1 for a free one; `None` unless of four dimensions.

    Where both are free there is no reshape that tells them, so that is left as it is.
    """
    value = linears[0].meta.get("val") if linears else None
    if not isinstance(value, Tensor) or value.dim() != 4:
        return None
    sizes = [fixed_size(size) for size in value.shape[1:3]]
    return None if sizes == [None, None] else [-1 if size is None else size for size in sizes]


def _unflatten(graph: fx.GraphModule, layer: fx.Node, spread: list[int]) -> None:
    with graph.graph.inserting_after(layer):
        result = graph.graph.call_function(aten.unflatten.int, (layer, 1, spread))
    layer.replace_all_uses_with(result, lambda user: user is not result)
    if "layer" in layer.meta:
        result.meta["layer"] = layer.meta.pop("layer")


def _wrapped(graph: fx.GraphModule, source: fx.Node, axis: int, left: int, right: int) -> fx.Node:
    """A tensor with its last values in front of it, and its first ones behind."""
    call, parts = graph.graph.call_function, [source]
    if left:
        parts.insert(0, call(aten.slice.Tensor, (source, axis, -left, sys.maxsize)))
    if right:
        parts.append(call(aten.slice.Tensor, (source, axis, 0, right)))
    return call(aten.cat.default, (parts, axis)) if len(parts) > 1 else source
