"""The groups of a prepared graph as a tree: what may be quantized, together with what, and how."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.markup import escape
from rich.tree import Tree
from torch import fx

from fxmpq.costs.weights import weight_bytes
from fxmpq.formats import Precision
from fxmpq.graph.layers import place_of
from fxmpq.graph.operators import OPERATORS, argument
from fxmpq.graph.state import GraphState, Group, Layer, LeftFloat, require
from fxmpq.quantizers.modules import ActivationQuantizer
from fxmpq.report.wording import counted, percent
from fxmpq.targets.registry import TARGETS

Nodes = Mapping[str, fx.Node]

_FLOAT = Precision()


def describe_groups(graph: fx.GraphModule) -> Tree:
    """Show what a prepared graph can be quantized to, for the terminal.

    A branch for each group: its operator and the activation that the target fuses into it, its
    candidates (the chosen one as `>w4a8<`, once a plan is applied), the weights' size in float and
    in fewest bits, and multiply-accumulates for one sample. Under it stand its layers, if there
    are several, with why they share a precision, and the tensors that are stored quantized. The
    last branch is what stays in float, by reason.

    Args:
        graph: From `prepare` or a later step.

    Returns:
        A Rich tree; print it with `rich.print`.

    Raises:
        FxmpqError: If the graph has no groups yet.
    """
    state = require(graph, stage="prepared")
    nodes = {node.name: node for node in graph.graph.nodes}
    quantized = [group for group in state.groups if group.candidates != (_FLOAT,)]
    tree = Tree(_heading(state, quantized))
    for group in quantized:
        branch = tree.add(_group_line(group, nodes, state))
        if len(group.layers) > 1:
            for layer in group.layers:
                branch.add(_member_line(layer, group, nodes, state))
        for formats, places in _stored(graph, group).items():
            branch.add(f"[dim]stored as[/] {formats}[dim]: {escape(', '.join(places))}[/]")
    if state.left_float:
        _add_left_float(tree, state)
    return tree


def _heading(state: GraphState, quantized: Sequence[Group]) -> str:
    layers = sum(len(group.layers) for group in quantized)
    sizes = [sum(weight_bytes(g, _FLOAT) for g in groups) for groups in (quantized, state.groups)]
    macs = sum(_macs(group) for group in quantized)
    every = sum(map(_macs, state.groups)) + sum(entry.macs for entry in state.left_float)
    return (
        f"[bold]{layers} layers in {len(quantized)} groups for {state.target}[/]: "
        f"{counted(sizes[0], 'B')} of weights ({percent(sizes[0] / max(sizes[1], 1))} of those in "
        f"layers), {counted(macs)} MACs a sample ({percent(macs / max(every, 1))} of all)"
    )


def _group_line(group: Group, nodes: Nodes, state: GraphState) -> str:
    chosen = state.choices.get(group.name)
    names = [
        f"[reverse]>{candidate}<[/]" if str(candidate) == chosen else str(candidate)
        for candidate in group.candidates
    ]
    smallest = min(group.candidates, key=lambda candidate: candidate.sort_key)
    sizes = (weight_bytes(group, precision) for precision in (_FLOAT, smallest))
    size = " to ".join(counted(found, "B") for found in sizes)
    first = group.layers[0]
    what = "" if len(group.layers) > 1 else f"  {_operator(first, nodes, state)}"
    line = f"[bold]{escape(group.name)}[/]{what}  [cyan]{' '.join(names)}[/]  {size}"
    return line + _macs_text(_macs(group))


def _member_line(layer: Layer, group: Group, nodes: Nodes, state: GraphState) -> str:
    line = f"{_own_name(layer, group)}  {_operator(layer, nodes, state)}{_macs_text(layer.macs)}"
    for other in group.layers:
        if other is layer:
            break
        if other.weight == layer.weight:
            return f"{line}  [dim]has the weight of {_own_name(other, group)}[/]"
        if _input(other, nodes) == _input(layer, nodes):
            return f"{line}  [dim]reads the input of {_own_name(other, group)}[/]"
    return line


def _own_name(layer: Layer, group: Group) -> str:
    """What tells a layer from the others of its group: its path behind what they share."""
    paths = [found.name.split(".")[:-1] for found in group.layers]
    shared = 0
    while all(len(path) > shared and path[shared] == paths[0][shared] for path in paths):
        shared += 1
    return escape(".".join(layer.name.split(".")[shared:]))


def _input(layer: Layer, nodes: Nodes) -> object:
    operator = OPERATORS[nodes[layer.node].target]
    return argument(nodes[layer.node], operator.input)


def _macs(group: Group) -> int:
    return sum(layer.macs for layer in group.layers)


def _macs_text(macs: int) -> str:
    return f", {counted(macs)} MACs" if macs else ""


def _operator(layer: Layer, nodes: Nodes, state: GraphState) -> str:
    """A layer's kind, the activation that the target fuses into it, and its weight's shape."""
    readers = list(nodes[layer.node].users)
    while len(readers) == 1 and readers[0].op == "call_module":
        readers = list(readers[0].users)
    target = str(state.target)
    fused = TARGETS[target].rules.fused_activations if target in TARGETS else frozenset()
    follower = ""
    if len(readers) == 1 and readers[0].target in fused:
        follower = f" + {str(readers[0].target).split('.')[1]}"
    shape = "x".join(map(str, layer.weight_shape))
    return f"[green]{layer.kind}{follower}[/] {shape}"


def _stored(graph: fx.GraphModule, group: Group) -> dict[str, list[str]]:
    """Formats to the tensors that the target stores in them, by the place that computes them."""
    sources = {node.target: node.args[0] for node in graph.graph.find_nodes(op="call_module")}
    found: dict[str, list[str]] = {}
    for name in group.activation_quantizers:
        quantizer, source = graph.get_submodule(name), sources[name]
        assert isinstance(quantizer, ActivationQuantizer)
        assert isinstance(source, fx.Node)
        formats = " ".join(candidate.name for candidate in quantizer.formats)
        found.setdefault(formats, []).append(place_of(source))
    return found


def _add_left_float(tree: Tree, state: GraphState) -> None:
    by_reason: dict[str, list[LeftFloat]] = {}
    for entry in state.left_float:
        by_reason.setdefault(entry.reason, []).append(entry)
    macs = {layer.name: layer.macs for group in state.groups for layer in group.layers}
    branch = tree.add(f"[bold]stays in float[/]  {len(state.left_float)} in all")
    for reason, entries in by_reason.items():
        total = sum(entry.macs or macs.get(entry.name, 0) for entry in entries)
        twig = branch.add(f"{escape(reason)}{_macs_text(total)}")
        for entry in entries:
            twig.add(f"[dim]{escape(entry.name)}[/]")
