"""The state of a graph as JSON and back, checked against the graph that it belongs to."""

from __future__ import annotations

from torch import Tensor, fx

from fxmpq.errors import FileFormatError, FxmpqError
from fxmpq.graph.attributes import get_tensor
from fxmpq.graph.legality import check_canonical, check_prepared
from fxmpq.graph.state import GraphState, Group
from fxmpq.quantizers.modules import ActivationQuantizer, BiasCorrection, WeightQuantizer
from fxmpq.storage.fields import decode_fields, encode_fields
from fxmpq.storage.tensors import TensorReader, TensorWriter
from fxmpq.storage.trees import decode_tree, encode_tree
from fxmpq.storage.values import Surroundings, decode_value, encode_value

_QUANTIZERS = (ActivationQuantizer, WeightQuantizer, BiasCorrection)
_CALL, _EXAMPLE = "call_spec", "example"


def encode_state(state: GraphState, writer: TensorWriter) -> dict[str, object]:
    """Write a state; its example's tensors go to the file of tensors.

    Raises:
        FileFormatError: If a field holds what cannot be stored.
    """
    example = [
        {"tensor": writer.add(f"example/{index}", leaf)}
        if isinstance(leaf, Tensor)
        else {"value": encode_value(leaf)}
        for index, leaf in enumerate(state.example)
    ]
    fields = encode_fields(state, leave=(_CALL, _EXAMPLE))
    return {_CALL: encode_tree(state.call_spec), _EXAMPLE: example, **fields}


def decode_state(found: object, reader: TensorReader) -> GraphState:
    """Read a state back.

    Raises:
        FileFormatError: If a field is missing, unknown or of another type.
    """
    if not isinstance(found, dict) or not isinstance(found.get(_EXAMPLE), list):
        raise FileFormatError(f"a state has {_CALL} and {_EXAMPLE}; found {str(found)[:80]!r}")
    others = {
        _CALL: decode_tree(found.get(_CALL)),
        _EXAMPLE: tuple(_decode_leaf(leaf, reader) for leaf in found[_EXAMPLE]),
    }
    fields = {name: entry for name, entry in found.items() if name not in others}
    return decode_fields(GraphState, fields, "state", others)


def _decode_leaf(found: object, reader: TensorReader) -> object:
    if isinstance(found, dict) and set(found) == {"tensor"}:
        return reader.tensor(found["tensor"]).cpu()
    if isinstance(found, dict) and set(found) == {"value"}:
        return decode_value(found["value"], Surroundings())
    raise FileFormatError(f"an input is a tensor or a value; found {str(found)[:80]!r}")


def check_state(graph: fx.GraphModule, state: GraphState) -> None:
    """Check that a graph is legal at its stage and has all that its state names.

    Raises:
        FileFormatError: Naming what is missing or does not fit.
    """
    placeholders = graph.graph.find_nodes(op="placeholder")
    if state.call_spec.num_leaves != len(state.example) or len(placeholders) != len(state.example):
        raise FileFormatError("the state's example and call do not fit the graph's placeholders")
    for node, leaf in zip(placeholders, state.example, strict=True):
        value = node.meta.get("val")
        if isinstance(leaf, Tensor) and not (
            isinstance(value, Tensor) and value.dtype == leaf.dtype and value.dim() == leaf.dim()
        ):
            raise FileFormatError(f"the example of {node.name!r} is none of its values")
    try:
        _check_legal(graph, state)
        _check_groups(graph, state)
        if state.calibrated:
            _check_calibrated(graph)
    except (AttributeError, FxmpqError, RuntimeError) as error:
        raise FileFormatError(f"the stored graph is not legal: {error}") from error


def _check_legal(graph: fx.GraphModule, state: GraphState) -> None:
    """The graph is legal at its stage, and has every tensor and quantizer that its nodes name."""
    if state.target is None:
        check_canonical(graph)
    else:
        check_prepared(graph, frozenset(_quantizer_names(state.groups)))
    for node in graph.graph.find_nodes(op="get_attr"):
        get_tensor(graph, str(node.target))
    for node in graph.graph.find_nodes(op="call_module"):
        is_quantizer = isinstance(graph.get_submodule(str(node.target)), _QUANTIZERS)
        if not is_quantizer or len(node.args) != 1 or node.kwargs:
            raise FileFormatError(f"{node.target!r} is no quantizer that is called on one value")


def _quantizer_names(groups: tuple[Group, ...]) -> set[str]:
    names = {name for group in groups for name in group.activation_quantizers}
    layers = [layer for group in groups for layer in group.layers]
    found = (name for layer in layers for name in (layer.weight_quantizer, layer.bias_correction))
    return names | {name for name in found if name is not None}


def _check_groups(graph: fx.GraphModule, state: GraphState) -> None:
    """Layers name nodes and weights that there are, and choices groups and candidates."""
    nodes = {node.name for node in graph.graph.nodes}
    for layer in (layer for group in state.groups for layer in group.layers):
        if layer.node not in nodes:
            raise FileFormatError(f"layer {layer.name!r} is of no node {layer.node!r}")
        if tuple(get_tensor(graph, layer.weight).shape) != layer.weight_shape:
            raise FileFormatError(f"layer {layer.name!r} has not the shape {layer.weight_shape}")
    for group, precision in state.choices.items():
        if group not in {found.name for found in state.groups}:
            raise FileFormatError(f"there is no group {group!r} to be at {precision}")
        state.group(group).candidate(precision)


def _check_calibrated(graph: fx.GraphModule) -> None:
    """Every quantizer has the ranges or scales of its formats."""
    for name, module in graph.named_modules():
        if isinstance(module, ActivationQuantizer):
            if {found.name for found in module.formats} - set(module.ranges):
                raise FileFormatError(f"quantizer {name!r} lacks a range")
        elif isinstance(module, WeightQuantizer):
            for number_format in module.formats:
                module.scale(number_format)
