"""What the compiler must see written differently, so that it runs it on integers, and rightly."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from fxmpq.graph.attributes import get_tensor
from fxmpq.targets.decomposed import quantize_again
from fxmpq.targets.two_dimensions import IN_TWO_DIMENSIONS, geometry_of_two

aten = torch.ops.aten
QUANTIZE = torch.ops.quantized_decomposed.quantize_per_tensor.default
DEQUANTIZE = torch.ops.quantized_decomposed.dequantize_per_tensor.default
DEQUANTIZE_WEIGHT = torch.ops.quantized_decomposed.dequantize_per_channel.default

_ONE_CHANNEL = (0, 0, 0, 0, 0, 1)
"""How much is added to the two sides of the last three dimensions, the last one first."""


def rewrite_for_compiler(graph: fx.GraphModule) -> None:
    """Rewrite a graph from `to_decomposed` in place; it computes the same.

    Pooled codes are codes again, linear layers read codes in C order, convolutions over one
    dimension are over two, those of one channel read another one, of weight 0, and weights' zero
    points are `int32`, as the kernels take them.

    Args:
        graph: With `uint8` codes.
    """
    for node in list(graph.graph.nodes):
        if node.target is aten.max_pool2d.default and dequantization_read_by(node):
            # The compiler pools codes where codes are wanted, and takes for granted that both have
            # one scale: it must see the quantization that changes nothing.
            quantize_again(graph, node)
        elif node.target is aten.linear.default:
            _lay_out_codes(graph, node)
        elif node.target in IN_TWO_DIMENSIONS:
            _widen(graph, node)
    for node in graph.graph.find_nodes(op="call_function", target=aten.conv2d.default):
        _add_channel(graph, node)
    for node in graph.graph.find_nodes(op="call_function", target=DEQUANTIZE_WEIGHT):
        name = str(node.args[2].target)
        graph.register_buffer(name, get_tensor(graph, name).int())


def separate_uses(graph: fx.GraphModule) -> None:
    """Give each use of a weight scales of its own, in place.

    The compiler computes once what is twice the same, and finds no layer behind what two layers
    read: a layer that is used twice would run in float.

    Args:
        graph: From `to_decomposed`.
    """
    seen: set[str] = set()
    for node in graph.graph.find_nodes(op="call_function", target=DEQUANTIZE_WEIGHT):
        name = str(node.args[1].target)
        if name in seen:
            own = f"{name}_of_{node.name}"
            graph.register_buffer(own, get_tensor(graph, name).clone())
            with graph.graph.inserting_before(node):
                node.update_arg(1, graph.graph.get_attr(own))
        seen.add(name)


def dequantization_read_by(node: fx.Node) -> fx.Node | None:
    """The dequantization that a node reads first, or `None` if it reads no codes.

    Args:
        node: A layer, or what else reads what codes stand for.
    """
    source = node.args[0]
    return source if isinstance(source, fx.Node) and source.target is DEQUANTIZE else None


def _lay_out_codes(graph: fx.GraphModule, linear: fx.Node) -> None:
    """Have a linear layer read codes in C order.

    In another order it becomes a batched product, which the compiler does not run on integers,
    and which torch 2.13 stumbles over where sizes are free.
    """
    source = dequantization_read_by(linear)
    if source is not None:
        with graph.graph.inserting_before(source):
            codes = graph.graph.call_function(aten.contiguous.default, (source.args[0],))
        source.update_arg(0, codes)


def _stored_codes(graph: fx.GraphModule, conv: fx.Node) -> Tensor | None:
    """The codes of a convolution's weight; `None` if the compiler does not run it on integers."""
    weight = conv.args[1]
    if not isinstance(weight, fx.Node) or weight.target is not DEQUANTIZE_WEIGHT:
        return None
    return (
        None if dequantization_read_by(conv) is None else get_tensor(graph, _name_of_codes(weight))
    )


def _store_instead(graph: fx.GraphModule, conv: fx.Node, suffix: str, codes: Tensor) -> None:
    """Let a convolution read other codes of its weight; what else reads them keeps them."""
    weight = conv.args[1]
    assert isinstance(weight, fx.Node)
    name = f"{_name_of_codes(weight)}_{suffix}"
    graph.register_buffer(name, codes)
    with graph.graph.inserting_before(weight):
        weight.update_arg(0, graph.graph.get_attr(name))


def _name_of_codes(weight: fx.Node) -> str:
    stored = weight.args[0]
    assert isinstance(stored, fx.Node)
    return str(stored.target)


def _change_input(graph: fx.GraphModule, conv: fx.Node, target: object, *args: object) -> None:
    """Pass the codes that a convolution reads through an operator."""
    source = conv.args[0]
    assert isinstance(source, fx.Node)
    with graph.graph.inserting_before(source):
        changed = graph.graph.call_function(target, (source.args[0], *args))  # type: ignore[arg-type]
    source.update_arg(0, changed)


def _add_channel(graph: fx.GraphModule, conv: fx.Node) -> None:
    """Let a convolution of a single channel read a second one, with weights of 0.

    The order of one channel's values in memory is ambiguous, and torch 2.13 takes it once for the
    one and once for the other.
    """
    codes = _stored_codes(graph, conv)
    groups = conv.args[6] if len(conv.args) > 6 else 1
    if codes is None or codes.shape[1] != 1 or groups != 1:
        return
    _store_instead(graph, conv, "filled", torch.nn.functional.pad(codes, _ONE_CHANNEL))
    _change_input(graph, conv, aten.constant_pad_nd.default, list(_ONE_CHANNEL))


def _widen(graph: fx.GraphModule, conv: fx.Node) -> None:
    """Compute a convolution over one dimension as one over two; torch 2.13 fails to compile it."""
    codes = _stored_codes(graph, conv)
    if codes is None:
        return
    _store_instead(graph, conv, "2d", codes.unsqueeze(2))
    _change_input(graph, conv, aten.unsqueeze.default, 2)
    call = graph.graph.call_function
    with graph.graph.inserting_before(conv):
        operands = (*conv.args[:3], *geometry_of_two(conv))
        wide = call(IN_TWO_DIMENSIONS[conv.target], operands)
        narrow = call(aten.squeeze.dim, (wide, 2))
    conv.replace_all_uses_with(narrow)
    graph.graph.erase_node(conv)
