"""What the compiler must see written differently, so that it runs it on integers, and rightly."""

from __future__ import annotations

import torch
from torch import fx

from fxmpq.graph.attributes import get_tensor
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
        if node.target is aten.max_pool2d.default:
            _pool_codes(graph, node)
        elif node.target is aten.linear.default:
            _lay_out_codes(graph, node)
        elif node.target in IN_TWO_DIMENSIONS:
            _widen(graph, node)
    for node in graph.graph.find_nodes(op="call_function", target=aten.conv2d.default):
        _add_channel(graph, node)
    for node in graph.graph.find_nodes(op="call_function", target=DEQUANTIZE_WEIGHT):
        name = str(node.args[2].target)
        graph.register_buffer(name, get_tensor(graph, name).int())


def _reads_codes(node: fx.Node) -> fx.Node | None:
    """The dequantization that a node reads first, or `None` if it reads no codes."""
    source = node.args[0]
    return source if isinstance(source, fx.Node) and source.target is DEQUANTIZE else None


def _pool_codes(graph: fx.GraphModule, pool: fx.Node) -> None:
    """Have a pooling's readers dequantize codes, which are those that it reads.

    The compiler pools codes where codes are wanted, and takes for granted that both have one
    scale: it must see the quantization that changes nothing.
    """
    source = _reads_codes(pool)
    if source is None:
        return
    grid, readers = source.args[1:], list(pool.users)
    with graph.graph.inserting_after(pool):
        codes = graph.graph.call_function(QUANTIZE, (pool, *grid))
    for reader in readers:
        with graph.graph.inserting_before(reader):
            real = graph.graph.call_function(DEQUANTIZE, (codes, *grid))
        reader.replace_input_with(pool, real)


def _lay_out_codes(graph: fx.GraphModule, linear: fx.Node) -> None:
    """Have a linear layer read codes in C order.

    In another order it becomes a batched product, which the compiler does not run on integers,
    and which torch 2.13 stumbles over where sizes are free.
    """
    source = _reads_codes(linear)
    if source is not None:
        with graph.graph.inserting_before(source):
            codes = graph.graph.call_function(aten.contiguous.default, (source.args[0],))
        source.update_arg(0, codes)


def _add_channel(graph: fx.GraphModule, conv: fx.Node) -> None:
    """Let a convolution of a single channel read a second one, with weights of 0.

    The order of one channel's values in memory is ambiguous, and torch 2.13 takes it once for the
    one and once for the other.
    """
    source, weight = _reads_codes(conv), conv.args[1]
    if source is None or getattr(weight, "target", None) is not DEQUANTIZE_WEIGHT:
        return
    assert isinstance(weight, fx.Node)
    stored = weight.args[0]
    assert isinstance(stored, fx.Node)
    codes = get_tensor(graph, str(stored.target))
    groups = conv.args[6] if len(conv.args) > 6 else 1
    if codes.shape[1] != 1 or groups != 1:
        return
    name = f"{stored.target}_filled"
    graph.register_buffer(name, torch.nn.functional.pad(codes, _ONE_CHANNEL))
    with graph.graph.inserting_before(weight):
        weight.update_arg(0, graph.graph.get_attr(name))
    with graph.graph.inserting_before(source):
        filled = aten.constant_pad_nd.default, (source.args[0], list(_ONE_CHANNEL))
        source.update_arg(0, graph.graph.call_function(*filled))


def _widen(graph: fx.GraphModule, conv: fx.Node) -> None:
    """Compute a convolution over one dimension as one over two; torch 2.13 fails to compile it."""
    source, weight = _reads_codes(conv), conv.args[1]
    if source is None or getattr(weight, "target", None) is not DEQUANTIZE_WEIGHT:
        return
    assert isinstance(weight, fx.Node)
    stored = weight.args[0]
    assert isinstance(stored, fx.Node)
    name = f"{stored.target}_2d"
    graph.register_buffer(name, get_tensor(graph, str(stored.target)).unsqueeze(2))
    call = graph.graph.call_function
    with graph.graph.inserting_before(weight):
        weight.update_arg(0, graph.graph.get_attr(name))
    with graph.graph.inserting_before(source):
        source.update_arg(0, call(aten.unsqueeze.default, (source.args[0], 2)))
    with graph.graph.inserting_before(conv):
        operands = (*conv.args[:3], *geometry_of_two(conv))
        wide = call(IN_TWO_DIMENSIONS[conv.target], operands)
        narrow = call(aten.squeeze.dim, (wide, 2))
    conv.replace_all_uses_with(narrow)
    graph.graph.erase_node(conv)
