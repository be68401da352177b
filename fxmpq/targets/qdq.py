"""The quantize-dequantize form: a planned graph in operators that compilers recognise.

Layers stay the ATen operators they were and read real numbers; a compiler that knows the form
moves the quantization into them. The graph runs in PyTorch, so it can be checked there.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, fx

from fxmpq.errors import TargetError
from fxmpq.formats import NumberFormat, Precision
from fxmpq.granularity import Dynamic, PerBlock, PerTensor
from fxmpq.graph.attributes import get_tensor
from fxmpq.graph.operators import OPERATORS, argument
from fxmpq.graph.state import Layer, state_of
from fxmpq.quantizers.modules import ActivationQuantizer, WeightQuantizer
from fxmpq.quantizers.scales import scale_rows, spread_scale

# Defines the operators `fxmpq::*` of this form.
from fxmpq.targets import qdq_operators  # noqa: F401
from fxmpq.targets.lowering import finish, lower, quantizer_of, store_tensor
from fxmpq.targets.outcome import layer_names, layer_precision

aten = torch.ops.aten


def to_qdq(graph: fx.GraphModule, narrow: frozenset[int] = frozenset()) -> fx.GraphModule:
    """Replace a planned graph's quantizers by operators of this form.

    An activation quantizer becomes `fake_quantize`, or `fake_quantize_rows` where it finds a range
    for each row at every run; a weight becomes `widened_codes`, a cast to
    `float32` and a product with its scales; an embedding looks up codes and scales and multiplies
    those. The operators carry an index: a quantizer's among `active_quantizers(graph)`, a
    layer's among `layers_of(graph)`.

    Args:
        graph: With chosen precisions, all of integers of at most 8 bits; not changed.
        narrow: Widths that the runtime's linear layers on float input read as they are stored;
            these take `stored_numbers` instead of widened codes.

    Returns:
        A graph without modules; weight codes are `int8` buffers.

    Raises:
        TargetError: If a range that is found at every run is of a whole tensor, or symmetric.
    """

    def store(
        rewritten: fx.GraphModule,
        node: fx.Node,
        place: tuple[Layer, Precision],
        quantizer: WeightQuantizer,
        index: int,
    ) -> None:
        layer, precision = place
        if layer.kind == "embedding":
            _look_up(rewritten, node, quantizer, index)
            return
        reads_narrow = layer.kind == "linear" and precision.activation is None
        is_widened = not (reads_narrow and precision.weight_bits in narrow)
        _store_weight(rewritten, node, quantizer, index, is_widened=is_widened)

    return rewrite_quantizers(graph, _round, store)


RoundActivation = Callable[[fx.GraphModule, fx.Node, ActivationQuantizer, int], None]
"""Called with the graph, a quantizer's call, its module and its number; takes the call's place."""

StoreWeight = Callable[
    [fx.GraphModule, fx.Node, tuple[Layer, Precision], WeightQuantizer, int], None
]
"""Called with the graph, a layer's node, the layer with its precision, the quantizer of its weight
and the layer's number; has the node read stored codes, or takes its place."""


def rewrite_quantizers(
    graph: fx.GraphModule, round_activation: RoundActivation, store_weight: StoreWeight
) -> fx.GraphModule:
    """Rewrite a planned graph's quantizers, each kind in one way.

    Args:
        graph: With chosen precisions; not changed.
        round_activation: Rewrites the call of an activation quantizer.
        store_weight: Rewrites a layer whose weight is quantized.

    Returns:
        A lowered copy, without what no node reads any more.
    """
    rewritten = lower(graph)
    nodes = {node.name: node for node in rewritten.graph.nodes}
    for index, name in enumerate(active_quantizers(graph)):
        quantizer = quantizer_of(rewritten, nodes[name])
        assert isinstance(quantizer, ActivationQuantizer)
        round_activation(rewritten, nodes[name], quantizer, index)
    for index, place in enumerate(layers_of(graph)):
        node = nodes[place[0].node]
        weight = quantizer_of(rewritten, argument(node, OPERATORS[node.target].weight))
        if isinstance(weight, WeightQuantizer):
            store_weight(rewritten, node, place, weight, index)
    finish(rewritten)
    return rewritten


def _round(
    graph: fx.GraphModule, node: fx.Node, quantizer: ActivationQuantizer, index: int
) -> None:
    """Replace a quantizer by `fake_quantize` or `fake_quantize_rows`."""
    active = quantizer.active
    assert active is not None
    operator = torch.ops.fxmpq.fake_quantize_rows.default
    grid: tuple[float, ...] = (active.bits, index)
    if active.dynamic is None:
        found = quantizer.ranges[active.name]
        operator = torch.ops.fxmpq.fake_quantize.default
        grid = (found.scale, found.zero_point, *grid)
    elif active.dynamic is not Dynamic.ROW or quantizer.is_symmetric:
        raise TargetError(
            f"{quantizer.name} finds a range at every run that is "
            f"{'symmetric' if quantizer.is_symmetric else 'of the whole tensor'}; this target "
            "finds those of rows (as in 'w8a8dt'), with zero points"
        )
    with graph.graph.inserting_before(node):
        rounded = graph.graph.call_function(operator, (node.args[0], *grid))
    put_instead(graph, node, rounded)


def active_quantizers(graph: fx.GraphModule) -> list[str]:
    """Names of the nodes that quantize an activation in a planned graph, in graph order."""
    return [
        node.name
        for node in graph.graph.nodes
        if isinstance(found := quantizer_of(graph, node), ActivationQuantizer)
        and found.active is not None
    ]


def layers_of(graph: fx.GraphModule) -> list[tuple[Layer, Precision]]:
    """The layers of a planned graph and their own precisions, group by group."""
    state = state_of(graph)
    return [
        (layer, layer_precision(layer, group.candidate(state.choices[group.name])))
        for group in state.groups
        for layer in group.layers
    ]


def computed_by(graph: fx.GraphModule) -> dict[str, str]:
    """The last layer or product before each activation quantizer of a planned graph.

    Args:
        graph: With chosen precisions.

    Returns:
        Its name by that of the quantizer's node, in graph order; without quantizers that none
        comes before.
    """
    names = layer_names(graph)
    order = {node: position for position, node in enumerate(graph.graph.nodes)}
    nodes = {node.name: node for node in order}
    found: dict[str, str] = {}
    for quantizer in active_quantizers(graph):
        waiting, seen, layers = [nodes[quantizer]], set[fx.Node](), list[fx.Node]()
        while waiting:
            for source in waiting.pop().all_input_nodes:
                if source.name in names:
                    layers.append(source)
                elif source not in seen:
                    seen.add(source)
                    waiting.append(source)
        if layers:
            found[quantizer] = names[max(layers, key=order.__getitem__).name]
    return found


def _store_weight(
    graph: fx.GraphModule,
    node: fx.Node,
    quantizer: WeightQuantizer,
    index: int,
    *,
    is_widened: bool,
) -> None:
    """Let a layer read real numbers that are computed from stored codes."""
    codes, scale, found = stored_codes(graph, quantizer)
    shape = codes.shape
    is_blocked = isinstance(found.granularity, PerBlock)
    if is_blocked:
        codes = scale_rows(codes, quantizer.axis, found.granularity).reshape(*scale.shape, -1)
        scale = scale.unsqueeze(-1)
    else:
        scale = spread_scale(scale, shape, quantizer.axis, found.granularity)
    stored = store_tensor(graph, f"codes_{quantizer.name}", codes, node)
    scales = store_tensor(graph, f"scale_{quantizer.name}", scale, node)
    with graph.graph.inserting_before(node):
        if is_widened:
            real = _widened_numbers(graph, stored, found.bits, index)
        else:
            numbers = torch.ops.fxmpq.stored_numbers.default
            real = graph.graph.call_function(numbers, (stored, found.bits, index))
        real = graph.graph.call_function(aten.mul.Tensor, (real, scales))
        if is_blocked:
            real = _without_blocks(graph, real, codes, shape, quantizer.axis)
    node.update_arg(OPERATORS[node.target].weight, real)


def _without_blocks(
    graph: fx.GraphModule, blocks: fx.Node, codes: Tensor, shape: torch.Size, axis: int
) -> fx.Node:
    """Bring `[channels, blocks, values]` into a weight's shape, as `scale_rows` came from it."""
    moved = list(shape)
    moved[0], moved[axis] = moved[axis], moved[0]
    values = math.prod(moved[1:])
    call = graph.graph.call_function
    real = call(aten.reshape.default, (blocks, [len(codes), -1]))
    if codes[0].numel() != values:
        real = call(aten.slice.Tensor, (real, 1, 0, values))
    if len(moved) > 2:
        real = call(aten.reshape.default, (real, moved))
    return real if axis == 0 else call(aten.transpose.int, (real, 0, axis))


def _look_up(graph: fx.GraphModule, node: fx.Node, quantizer: WeightQuantizer, index: int) -> None:
    """Replace an embedding by look-ups of codes and scales, so that no float table is made."""
    codes, scale, found = stored_codes(graph, quantizer)
    width, indices = codes.shape[1], node.args[1]
    is_blocked, is_shared = (isinstance(found.granularity, k) for k in (PerBlock, PerTensor))
    if is_blocked:
        codes = scale_rows(codes, 0, found.granularity).reshape(len(codes), -1)
    elif not is_shared:
        scale = scale.unsqueeze(-1)
    stored = store_tensor(graph, f"codes_{quantizer.name}", codes, node)
    scales = store_tensor(graph, f"scale_{quantizer.name}", scale, node)
    call = graph.graph.call_function
    with graph.graph.inserting_before(node):
        table = call(torch.ops.fxmpq.widened_codes.default, (stored, found.bits, index))
        rows = _cast(graph, call(aten.embedding.default, (table, indices)))
        if not is_shared:
            scales = call(aten.embedding.default, (scales, indices))
        if is_blocked:
            blocks = [scale.shape[1], codes.shape[1] // scale.shape[1]]
            rows = call(aten.unflatten.int, (rows, -1, blocks))
            scales = call(aten.unsqueeze.default, (scales, -1))
        rows = call(aten.mul.Tensor, (rows, scales))
        if is_blocked:
            rows = call(aten.flatten.using_ints, (rows, -2, -1))
            rows = call(aten.slice.Tensor, (rows, -1, 0, width))
    put_instead(graph, node, rows)


def stored_codes(
    graph: fx.GraphModule, quantizer: WeightQuantizer
) -> tuple[Tensor, Tensor, NumberFormat]:
    """A weight's codes in its shape, its scales, and its format.

    Args:
        graph: Whose weight it is.
        quantizer: Of the weight, with an active format.
    """
    assert quantizer.active is not None
    codes = quantizer.codes(get_tensor(graph, quantizer.name).detach(), quantizer.active)
    return codes, quantizer.scale(quantizer.active), quantizer.active


def _widened_numbers(graph: fx.GraphModule, codes: fx.Node, bits: int, index: int) -> fx.Node:
    widened = torch.ops.fxmpq.widened_codes.default
    return _cast(graph, graph.graph.call_function(widened, (codes, bits, index)))


def _cast(graph: fx.GraphModule, codes: fx.Node) -> fx.Node:
    return graph.graph.call_function(aten._to_copy.default, (codes,), {"dtype": torch.float32})


def put_instead(graph: fx.GraphModule, node: fx.Node, other: fx.Node) -> None:
    """Let all readers of a node read another one, and drop it."""
    node.replace_all_uses_with(other)
    graph.graph.erase_node(node)
