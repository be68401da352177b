"""What a prepared graph has: groups and quantizers that fit each other and the nodes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from torch import Tensor, fx, nn

from fxmpq.graph.legality.exported import EVERYWHERE
from fxmpq.graph.legality.rule import Breaches, Rule, Subject, called
from fxmpq.graph.operators import argument, operator_of
from fxmpq.graph.products import product_operands
from fxmpq.graph.state import Layer
from fxmpq.quantizers.modules import ActivationQuantizer, BiasCorrection, WeightQuantizer

_QUANTIZERS = (ActivationQuantizer, WeightQuantizer, BiasCorrection)
_WIDEST = 32
"""Bits of the integers that biases are stored as."""

_OPERATIONS = frozenset({"placeholder", "get_attr", "call_function", "call_module", "output"})


def _inputs(subject: Subject) -> Breaches:
    placeholders = subject.graph.graph.find_nodes(op="placeholder")
    example, leaves = subject.state.example, subject.state.call_spec.num_leaves
    if not len(example) == leaves == len(placeholders):
        yield f"{len(placeholders)} inputs, a call of {leaves} and an example of {len(example)}"
        return
    for node, leaf in zip(placeholders, example, strict=True):
        value = node.meta.get("val")
        if isinstance(leaf, Tensor) and not (
            isinstance(value, Tensor) and value.dtype == leaf.dtype and value.dim() == leaf.dim()
        ):
            yield f"the example of {node.name!r} is none of its values"


def _operations(subject: Subject) -> Breaches:
    for node in subject.nodes.values():
        if node.op not in _OPERATIONS:
            yield f"node {node.name!r} is a {node.op}"


def _calls(subject: Subject) -> Breaches:
    counts = Counter(
        str(node.target) for node in subject.nodes.values() if node.op == "call_module"
    )
    owned = set(_names_in_groups(subject))
    for name, count in counts.items():
        if name not in owned:
            yield f"module {name!r} is called, and in no group"
        elif count > 1:
            yield f"quantizer {name!r} is called {count} times"
    for name in sorted(owned - set(counts)):
        yield f"quantizer {name!r} is in a group, and never called"


def _names_in_groups(subject: Subject) -> Iterator[str]:
    for group in subject.state.groups:
        yield from group.activation_quantizers
        for layer in group.layers:
            yield from filter(None, (layer.weight_quantizer, layer.bias_correction))


def _one_value(subject: Subject) -> Breaches:
    for name, node in subject.calls.items():
        if len(node.args) != 1 or node.kwargs:
            yield f"{name!r} is not called on one value"


def _quantizers(subject: Subject) -> Breaches:
    for name in subject.calls:
        if not isinstance(subject.modules.get(name), _QUANTIZERS):
            yield f"{name!r} is a {type(subject.modules.get(name)).__name__}"


def _places(subject: Subject) -> Breaches:
    for name, node in subject.calls.items():
        module, source = subject.modules[name], node.args[0]
        if isinstance(module, ActivationQuantizer):
            value = source.meta.get("val") if isinstance(source, fx.Node) else None
            if not isinstance(value, Tensor) or not value.is_floating_point():
                yield f"activation quantizer {name!r} reads no floating-point tensor"
        elif isinstance(module, WeightQuantizer):
            weight = subject.stored(source)
            if weight is None:
                yield f"weight quantizer {name!r} reads no stored tensor"
            elif not 0 <= module.axis < weight.dim():
                yield f"weight quantizer {name!r} has no axis {module.axis}"
        elif source is not None and subject.stored(source) is None:
            yield f"bias correction {name!r} reads neither a stored bias nor None"


def _layers(subject: Subject) -> Breaches:
    for _, layer in subject.layers:
        node = subject.nodes.get(layer.node)
        operator = None if node is None else operator_of(node)
        if node is None or operator is None or operator.kind != layer.kind:
            yield f"layer {layer.name!r} is of no {layer.kind} {layer.node!r}"
            continue
        problem = (
            _weight_problem(subject, layer, argument(node, operator.weight))
            or _bias_problem(layer, argument(node, operator.bias))
            or _input_problem(layer, argument(node, operator.input))
        )
        if problem:
            yield f"layer {layer.name!r} {problem}"
    for product in (entry for group in subject.state.groups for entry in group.products):
        node = subject.nodes.get(product.node)
        if node is None or not product_operands(node):
            yield f"product {product.name!r} is of no product of two tensors {product.node!r}"


def _weight_problem(subject: Subject, layer: Layer, read: object) -> str:
    if layer.weight_quantizer is not None:
        if not _is_call(read, layer.weight_quantizer):
            return f"does not read its weight through {layer.weight_quantizer!r}"
        assert isinstance(read, fx.Node)
        read = read.args[0]
    weight = subject.stored(read)
    if weight is None or not isinstance(read, fx.Node) or read.target != layer.weight:
        return f"does not read its weight {layer.weight!r}"
    if tuple(weight.shape) != layer.weight_shape:
        return f"has not the shape {layer.weight_shape}"
    if not 0 <= layer.channel_axis < weight.dim():
        return f"has no channel axis {layer.channel_axis}"
    return ""


def _bias_problem(layer: Layer, read: object) -> str:
    if layer.bias_correction is not None and not _is_call(read, layer.bias_correction):
        return f"does not read its bias through {layer.bias_correction!r}"
    return ""


def _input_problem(layer: Layer, read: object) -> str:
    if layer.input_quantizer is not None and not _is_call(read, layer.input_quantizer):
        return f"does not read its input through {layer.input_quantizer!r}"
    return ""


def _is_call(node: object, module: str) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_module" and node.target == module


def _bias_units(subject: Subject) -> Breaches:
    for _, layer in subject.layers:
        units = layer.bias_units
        if units is None:
            continue
        if not isinstance(subject.modules.get(units.source), ActivationQuantizer):
            yield (
                f"layer {layer.name!r} has a bias in units of {units.source!r}, which quantizes no "
                "activation"
            )
        if layer.weight_quantizer is None or layer.bias_correction is None:
            yield f"layer {layer.name!r} has units of a bias, and a weight or bias that stays real"
        if not 0 <= units.width <= _WIDEST:
            yield f"layer {layer.name!r} has units of a bias for codes of {units.width} bits"


def _groups(subject: Subject) -> Breaches:
    owners: dict[str, str] = {}
    for group in subject.state.groups:
        if not group.members or group.name != group.members[0].name:
            yield f"group {group.name!r} is not named after its first member"
        if not group.candidates or len(set(group.candidates)) < len(group.candidates):
            yield f"group {group.name!r} has no candidates, or one twice"
        names = {member.name for member in group.members}
        names |= {f"the weight {layer.weight}" for layer in group.layers if layer.weight_quantizer}
        for name in sorted({*names, *group.activation_quantizers}):
            other = owners.setdefault(name, group.name)
            if other != group.name:
                yield f"{name!r} is in the groups {other!r} and {group.name!r}"


def _formats(subject: Subject) -> Breaches:
    for group in subject.state.groups:
        weights = {candidate.weight for candidate in group.candidates} - {None}
        activations = {candidate.activation for candidate in group.candidates} - {None}
        held = [(name, activations) for name in group.activation_quantizers]
        held += [(str(e.weight_quantizer), weights) for e in group.layers if e.weight_quantizer]
        for name, wanted in held:
            found: set[object] = set(getattr(subject.modules.get(name), "formats", ()))
            if not wanted <= found:
                yield f"quantizer {name!r} lacks a format of its group's candidates"


def active_of(module: nn.Module | None) -> object:
    """The format that a quantizer is switched to, or `None`."""
    return getattr(module, "active", None)


def _off(subject: Subject) -> Breaches:
    for name, node in subject.calls.items():
        if active_of(subject.modules.get(name)) is not None:
            yield f"quantizer {name!r}, called at {called(node)}, is on"


INPUTS = Rule("inputs", "inputs, call structure and example fit each other", _inputs)
OPERATIONS = Rule(
    "functions and quantizers",
    "nodes read stored tensors, call functions or call modules",
    _operations,
    needed=True,
)
CALLS = Rule(
    "calls of quantizers", "each quantizer of the groups is called once", _calls, needed=True
)
ONE_VALUE = Rule("one value", "modules are called on one positional value", _one_value)
QUANTIZERS = Rule("quantizers", "the modules that are called are quantizers", _quantizers)
PLACES = Rule("places of quantizers", "quantizers read what they are made for", _places)
LAYERS = Rule(
    "layers",
    "each layer is a call of its operator that reads what the layer names, each product of one",
    _layers,
)
BIAS_UNITS = Rule(
    "units of biases",
    "where biases are integers, weights and what they multiply are codes",
    _bias_units,
)
GROUPS = Rule(
    "groups", "members, weights and quantizers are in one group, which has candidates", _groups
)
FORMATS = Rule("formats", "quantizers hold every format of their group's candidates", _formats)
OFF = Rule("all off", "no quantizer is on", _off)

# What a graph that trains shares with the others.
GROUPED = (EVERYWHERE[0], OPERATIONS, *EVERYWHERE[1:], INPUTS, CALLS, ONE_VALUE, GROUPS, LAYERS)
QUANTIZED = (*GROUPED, QUANTIZERS, PLACES, FORMATS, BIAS_UNITS)
PREPARED = (*QUANTIZED, OFF)
