"""The form in which XNNPACK's partitioner recognises layers on integers."""

from __future__ import annotations

import torch
from torch import fx

from fxmpq.graph.attributes import get_tensor
from fxmpq.graph.operators import OPERATORS, argument
from fxmpq.graph.rules import TargetRules
from fxmpq.quantizers.integer import per_channel
from fxmpq.targets.decomposed import quantize_again, to_decomposed
from fxmpq.targets.executorch.embeddings import pack_embeddings
from fxmpq.targets.executorch.shapes import flatten_rows, pad_by_slices
from fxmpq.targets.lowering import finish, store_tensor
from fxmpq.targets.qdq import layers_of
from fxmpq.targets.two_dimensions import IN_TWO_DIMENSIONS, geometry_of_two

aten = torch.ops.aten
own = torch.ops.fxmpq
quantized_decomposed = torch.ops.quantized_decomposed

_LARGEST_BIAS = 2**30
"""Half of what an `int32` accumulator holds; the products take the rest."""

_SMALLEST_RESCALE = 2.0**-32
"""XNNPACK refuses a layer whose accumulator is multiplied by less than this."""

_LARGEST_RESCALE = 2.0**8
"""As it does by this or more."""

_FUSED = frozenset({aten.relu.default, aten.relu6.default, aten.hardtanh.default})


def to_xnnpack_form(graph: fx.GraphModule, rules: TargetRules) -> fx.GraphModule:
    """Rewrite a planned graph so that XNNPACK runs its quantized layers on integers.

    It is `to_decomposed` with signed codes, and what XNNPACK asks for beyond that: a value that
    max pooling returns is quantized again, on the grid that it already lies on, so that integers
    are on both sides; one that is quantized twice on one grid is so once; the scale of an output
    channel is large enough for its bias, which is stored in 32-bit units of input scale times
    weight scale; 4-bit weights of an odd number of inputs are kept in bytes; low-bit embeddings
    are packed. A linear layer on real numbers, or whose result nothing stores, adds its bias
    behind it; a convolution that XNNPACK has no integer kernel for gets float weights. So it is
    with layers whose results have a grid too fine for their sums. Float convolutions over one
    dimension are over two, linear layers on rows over three at most, and circular padding is a
    `cat`.

    Args:
        graph: With chosen precisions; not changed.
        rules: The target's.

    Returns:
        A graph without modules. Nodes have in `meta["layer"]` the name of the planned graph's node
        whose result they compute, where they are not quantized for that.
    """
    rewritten = to_decomposed(graph, signed=True)
    _merge_grids(rewritten)
    for node in list(rewritten.graph.nodes):
        if node.target in rules.through and _is_real(node.args[0]):
            quantize_again(rewritten, node)
    for node in list(rewritten.graph.nodes):
        operator = OPERATORS.get(node.target)
        weight = argument(node, operator.weight) if operator is not None else None
        if isinstance(weight, fx.Node) and weight.target in _STORED:
            _fit_kernel(rewritten, node, weight)
    flatten_rows(rewritten)
    pad_by_slices(rewritten)
    for node in list(rewritten.graph.nodes):
        if node.target in IN_TWO_DIMENSIONS and node.args[1].op == "get_attr":
            _widen_float(rewritten, node)
    pack_embeddings(rewritten)
    finish(rewritten)
    return rewritten


def stored_names(graph: fx.GraphModule, rewritten: fx.GraphModule) -> dict[str, str]:
    """Names of the tensors that hold the layers' weights in a rewritten graph.

    Args:
        graph: The planned graph.
        rewritten: From `to_xnnpack_form`.

    Returns:
        By the layers' names, in the order they run; without layers that cannot be told.
    """
    order = {node.name: position for position, node in enumerate(graph.graph.nodes)}
    layers = sorted((layer for layer, _ in layers_of(graph)), key=lambda x: order[x.node])
    nodes = {node.name: node for node in rewritten.graph.nodes}
    tables = {
        name.removeprefix("packed_").rstrip("_"): name
        for node in rewritten.graph.find_nodes(op="call_function", target=aten.embedding.default)
        if (name := str(getattr(node.args[0], "target", "")))
    }
    found: dict[str, str] = {}
    for layer in layers:
        node = nodes.get(layer.node)
        table = tables.get(f"codes_{layer.weight}".replace(".", "_"))
        if node is not None:
            weight = argument(node, OPERATORS[node.target].weight)
            while isinstance(weight, fx.Node) and weight.op == "call_function":
                weight = weight.args[0]
            found[layer.name] = str(getattr(weight, "target", ""))
        elif table is not None:
            found[layer.name] = table
    return found


_BLOCKS = quantized_decomposed.dequantize_per_channel_group.default
_STORED = frozenset({quantized_decomposed.dequantize_per_channel.default, _BLOCKS})


def _is_real(node: object) -> bool:
    return _is_call(node, quantized_decomposed.dequantize_per_tensor.default)


def _is_call(node: object, target: object) -> bool:
    return isinstance(node, fx.Node) and node.target is target


def _merge_grids(graph: fx.GraphModule) -> None:
    """Read codes as they are where they would be made real and put on the same grid again."""
    quantize = quantized_decomposed.quantize_per_tensor.default
    for node in list(graph.graph.find_nodes(op="call_function", target=quantize)):
        source = node.args[0]
        if isinstance(source, fx.Node) and _is_real(source) and source.args[1:] == node.args[1:]:
            node.replace_all_uses_with(source.args[0])
            graph.graph.erase_node(node)


def _fit_kernel(graph: fx.GraphModule, node: fx.Node, weight: fx.Node) -> None:
    """Bring a layer that reads stored codes into the form of a kernel that XNNPACK has."""
    if node.target is own.linear.default:
        node.target, node.args = aten.linear.default, node.args[:3]
    if weight.target is not _BLOCKS:
        _widen_odd(graph, weight)
    is_linear = node.target is aten.linear.default
    is_on_rows = _is_call(node.args[0], quantized_decomposed.dequantize_per_token.default)
    grids = None if is_on_rows else _grids(node)
    if grids is not None and _hold_bias(graph, node, weight, *grids):
        return
    if not is_linear:
        _make_float(graph, node, weight)
    else:
        result = node
        if not (is_on_rows and _has_stored_bias(node)):
            result = _add_bias_behind(graph, node)
        result.meta["layer"] = node.name


def _has_stored_bias(node: fx.Node) -> bool:
    bias = argument(node, OPERATORS[node.target].bias)
    return not isinstance(bias, fx.Node) or bias.op == "get_attr"


def _add_bias_behind(graph: fx.GraphModule, linear: fx.Node) -> fx.Node:
    """Let a linear layer do without its bias; returns the sum with it.

    ExecuTorch 1.5 stores a bias in units of both scales, and has none for real numbers.
    """
    bias = argument(linear, OPERATORS[linear.target].bias)
    linear.args = linear.args[:2]
    if not isinstance(bias, fx.Node):
        return linear
    with graph.graph.inserting_after(linear):
        result = graph.graph.call_function(aten.add.Tensor, (linear, bias))
    linear.replace_all_uses_with(result, lambda user: user is not result)
    return result


def _grids(node: fx.Node) -> tuple[float, float] | None:
    """The scales of a layer's input and output codes; `None` if no integer kernel takes it."""
    source, output = node.args[0], _stored_output(node)
    if output is None or not _is_real(source) or not _has_stored_bias(node):
        return None
    assert isinstance(source, fx.Node)
    scales = source.args[1], output.args[1]
    assert isinstance(scales[0], float) and isinstance(scales[1], float)
    return scales[0], scales[1]


def _stored_output(node: fx.Node) -> fx.Node | None:
    """What quantizes a layer's result, alone or behind what runs fused with it."""
    for _ in range(2):
        if len(node.users) != 1:
            return None
        (node,) = node.users
        if node.target is quantized_decomposed.quantize_per_tensor.default:
            return node
        if node.target not in _FUSED:
            return None
    return None


def _widen_odd(graph: fx.GraphModule, weight: fx.Node) -> None:
    """Keep codes in bytes that XNNPACK would misread: 4-bit rows of an odd number of codes."""
    codes = get_tensor(graph, str(weight.all_input_nodes[0].target))
    if codes.shape[-1] % 2:
        *operands, _, _, dtype = weight.args
        weight.args = (*operands, -128, 127, dtype)


def _hold_bias(
    graph: fx.GraphModule, node: fx.Node, weight: fx.Node, input_scale: float, output_scale: float
) -> bool:
    """Fit the scales of channels of dead or nearly dead weights to their biases.

    XNNPACK stores a bias in units of weight scale times input scale, as an `int32`, and refuses
    to scale a sum by next to nothing, or by much. A channel without weights has any scale: the
    finest that holds its bias.

    Returns:
        Whether it takes the layer; it is as it was where not.
    """
    stored, channels, *_ = weight.all_input_nodes
    codes = get_tensor(graph, str(stored.target))
    scale = get_tensor(graph, str(channels.target)).double()
    scale = scale * codes.flatten(1).any(1)
    needed = torch.full_like(scale, _SMALLEST_RESCALE * output_scale / input_scale)
    bias = argument(node, OPERATORS[node.target].bias)
    if isinstance(bias, fx.Node):
        found = get_tensor(graph, str(bias.target)).detach().double().abs()
        needed = torch.maximum(needed, found / (input_scale * _LARGEST_BIAS))
    held = torch.maximum(scale, needed)
    if float(held.max()) * input_scale / output_scale >= _LARGEST_RESCALE:
        return False
    if bool((needed > scale).any()):
        ratio = per_channel(scale / held, codes.dim(), 0)
        fewer = torch.round(codes.double() * ratio).to(torch.int8)
        name = str(stored.target)
        weight.replace_input_with(stored, store_tensor(graph, name, fewer, weight))
        other = store_tensor(graph, str(channels.target), held.float(), weight)
        weight.replace_input_with(channels, other)
    return True


def _make_float(graph: fx.GraphModule, node: fx.Node, weight: fx.Node) -> None:
    """Let a layer read stored real numbers, its codes times their scales."""
    stored, channels, *_ = weight.all_input_nodes
    codes = get_tensor(graph, str(stored.target))
    scale = per_channel(get_tensor(graph, str(channels.target)), codes.dim(), 0)
    real = store_tensor(graph, str(stored.target).replace("codes", "real", 1), codes * scale, node)
    node.replace_input_with(weight, real)


def _widen_float(graph: fx.GraphModule, conv: fx.Node) -> None:
    """Compute a float convolution over one dimension as one over two.

    ExecuTorch 1.5 does so too, but takes the codes that a float layer reads or hands on for its
    own, and refuses it.
    """
    source, weight, *bias = conv.args[:3]
    assert isinstance(weight, fx.Node)
    name = str(weight.target)
    stored = store_tensor(graph, name, get_tensor(graph, name).unsqueeze(2), conv)
    with graph.graph.inserting_before(conv):
        wide = graph.graph.call_function(aten.unsqueeze.default, (source, 2))
    with graph.graph.inserting_after(conv):
        narrow = graph.graph.call_function(aten.squeeze.dim, (conv, 2))
    conv.replace_all_uses_with(narrow, lambda user: user is not narrow)
    conv.args = (wide, stored, *bias, *geometry_of_two(conv))
    conv.target = IN_TWO_DIMENSIONS[conv.target]
