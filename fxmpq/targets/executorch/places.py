"""Where the layers of a lowered program run: in which delegate, or in which portable kernel."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import fx
from torch.export import ExportedProgram

_WEIGHTS = {
    "aten.convolution.default": 1,
    "aten.linear.default": 1,
    "aten.addmm.default": 2,
    "aten.mm.default": 1,
    "aten.embedding.default": 0,
}
"""Positions of the weight among an operator's arguments."""

_CALL = "executorch_call_delegate"


@dataclass(frozen=True)
class Place:
    """Where a layer runs.

    Args:
        operator: The operator that computes it, as `aten.convolution`.
        delegate: Number of the call of XNNPACK that it is part of; `None` if it is of none.
        position: Its number among that call's layers.
    """

    operator: str
    delegate: int | None = None
    position: int = 0


def layer_places(program: ExportedProgram) -> dict[str, list[Place]]:
    """Find the layers of a partitioned program.

    Args:
        program: After partitioning, before its operators get output arguments.

    Returns:
        By the name of the stored weight that they read, in the order they run.
    """
    found: dict[str, list[Place]] = defaultdict(list)
    delegates = 0
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        if _name(node) != _CALL:
            for operator, weight in _layers(program, [node]):
                found[weight].append(Place(operator))
            continue
        inner = getattr(program.graph_module, str(node.args[0])).original_module
        for position, (operator, weight) in enumerate(_layers(inner, inner.graph.nodes)):
            found[weight].append(Place(operator, delegates, position))
        delegates += 1
    return dict(found)


def _layers(program: ExportedProgram, nodes: Iterable[fx.Node]) -> Iterator[tuple[str, str]]:
    """Operators that read a stored weight, with its name."""
    signature = program.graph_signature
    stored = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    for node in nodes:
        position = _WEIGHTS.get(_name(node))
        weight = "" if position is None else _origin(node.args[position])
        if weight in stored:
            yield _name(node).removesuffix(".default"), stored[weight]


def _origin(node: object) -> str:
    """The input that a value is made of, through what dequantizes or rearranges it."""
    while isinstance(node, fx.Node) and node.op == "call_function" and node.args:
        node = node.args[0]
    return node.name if isinstance(node, fx.Node) else ""


def _name(node: fx.Node) -> str:
    """An operator's name without its dialect."""
    return str(getattr(node.target, "__name__", node.target))
