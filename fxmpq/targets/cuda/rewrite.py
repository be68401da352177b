"""Rewriting a layer: onto a kernel on codes, or onto dequantized weights."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from torch import fx

from fxmpq.graph.operators import OPERATORS, argument
from fxmpq.targets.cuda.activations import ActivationCodes
from fxmpq.targets.cuda.arithmetic import channels_first, dequantized, looked_up, patches
from fxmpq.targets.cuda.device import DeviceFacts
from fxmpq.targets.cuda.kernels import KERNELS
from fxmpq.targets.cuda.operands import MakeOperands, Operands, tried_operands
from fxmpq.targets.cuda.rewrite_e4m3 import e4m3_operands
from fxmpq.targets.cuda.rewrite_int4 import int4_operands
from fxmpq.targets.cuda.rewrite_int8 import int8_operands
from fxmpq.targets.cuda.shape_rules import Asked, Choice, Kernel, choose_kernel
from fxmpq.targets.cuda.weighted import WeightedLayer, has_computed_bias
from fxmpq.targets.lowering import store_tensor

MAKERS: Mapping[str, MakeOperands] = {
    "_int_mm": int8_operands,
    "_scaled_mm": e4m3_operands,
    "_weight_int4pack_mm": int4_operands,
}
"""How each kernel's operands are made."""


def rewrite_layer(
    graph: fx.GraphModule,
    found: WeightedLayer,
    codes: ActivationCodes,
    device: DeviceFacts,
    float_name: str = "float",
) -> tuple[str, str]:
    """Let a layer compute on codes where a kernel allows it, else on dequantized weights.

    The layer's node stays, with its name, and returns what it returned.

    Args:
        graph: From `lower`; changed in place.
        found: The layer.
        codes: Of the graph's activations.
        device: Where it is to run.
        float_name: In what layers without a kernel on codes compute, for people.

    Returns:
        What it runs, and why not on codes; empty if it does.
    """
    if found.layer.kind == "embedding":
        _look_up(graph, found)
        return f"look-up of {_weight_name(found)} codes", ""
    choice = _choice(found, codes, device)
    if choice.kernel is None:
        _dequantize(graph, found)
        return _dequantized_text(found, float_name), choice.reason
    source = _source(found)
    make = partial(MAKERS[choice.kernel.name], found, choice.kernel, codes.grid(source))
    operands = tried_operands(make, found)
    if isinstance(operands, str):
        _dequantize(graph, found)
        reason = f"{choice.kernel.name} does not take it on {device}: {operands}"
        return _dequantized_text(found, float_name), reason
    _multiply(graph, found, operands, codes.of(source))
    return _kernel_text(found, choice.kernel, device), ""


def _choice(found: WeightedLayer, codes: ActivationCodes, device: DeviceFacts) -> Choice:
    """The kernel by its rules, and by what a graph may hold besides."""
    if has_computed_bias(found.node):
        return Choice(None, "its bias is computed, not stored")
    if found.precision.activation is not None and codes.grid(_source(found)) is None:
        return Choice(None, "its input has no stored range")
    return choose_kernel(KERNELS, Asked(found.shape, found.precision, device))


def _source(found: WeightedLayer) -> fx.Node:
    source = argument(found.node, OPERATORS[found.node.target].input)
    assert isinstance(source, fx.Node)
    return source


def _multiply(
    graph: fx.GraphModule, found: WeightedLayer, operands: Operands, rows: fx.Node
) -> None:
    """Put a product in a layer's place; a convolution's is over the patches of its input."""
    node, window = found.node, found.window
    stored = [
        None
        if tensor is None
        else store_tensor(graph, f"{name}_{found.layer.weight}", tensor, node)
        for name, tensor in operands.tensors.items()
    ]
    call = graph.graph.call_function
    if window is None:
        node.target, node.args = operands.multiply, (rows, *stored, *operands.settings)
        node.kwargs = {}
        return
    with graph.graph.inserting_before(node):
        reach = (window.kernel, window.stride, window.padding, window.dilation)
        rows = call(patches, (rows, *reach, operands.zero))
        product = call(operands.multiply, (rows, *stored, *operands.settings))
    node.target, node.args, node.kwargs = channels_first, (product, len(window.kernel)), {}


def _dequantize(graph: fx.GraphModule, found: WeightedLayer) -> None:
    """Let a layer read its weight from codes, in real numbers at every run."""
    codes, scale = _stored_weight(graph, found)
    with graph.graph.inserting_before(found.node):
        real = graph.graph.call_function(dequantized, (codes, scale, found.block))
    found.node.update_arg(OPERATORS[found.node.target].weight, real)


def _look_up(graph: fx.GraphModule, found: WeightedLayer) -> None:
    codes, scale = _stored_weight(graph, found)
    node = found.node
    node.target, node.args = looked_up, (codes, scale, _source(found), found.block)
    node.kwargs = {}


def _stored_weight(graph: fx.GraphModule, found: WeightedLayer) -> tuple[fx.Node, fx.Node]:
    name, node = found.layer.weight, found.node
    codes = store_tensor(graph, f"codes_{name}", found.codes, node)
    return codes, store_tensor(graph, f"scale_{name}", found.scale, node)


def _weight_name(found: WeightedLayer) -> str:
    assert found.precision.weight is not None
    return found.precision.weight.name


def _dequantized_text(found: WeightedLayer, float_name: str) -> str:
    activation = found.precision.activation
    seen = "float" if activation is None else activation.name
    return f"{float_name} on dequantized {_weight_name(found)} weights, {seen} input"


def _kernel_text(found: WeightedLayer, kernel: Kernel, device: DeviceFacts) -> str:
    text = f"{kernel.name} on {device}"
    if found.shape.positions > 1 and found.window is not None:
        text += f", patches of {'x'.join(map(str, found.window.kernel))}"
    return text
