"""The graph that is compiled: quantization where the compiler looks for it, and flat inputs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, fx

from fxmpq.graph.operators import OPERATORS, argument
from fxmpq.targets.decomposed import to_decomposed
from fxmpq.targets.inductor.bf16 import compute_in_bfloat16
from fxmpq.targets.inductor.joined import join_linears
from fxmpq.targets.inductor.rewrite import (
    DEQUANTIZE,
    DEQUANTIZE_WEIGHT,
    QUANTIZE,
    rewrite_for_compiler,
    separate_uses,
)
from fxmpq.targets.lowering import finish
from fxmpq.targets.program import move_to_cpu
from fxmpq.targets.qdq import active_quantizers, layers_of


@dataclass(frozen=True)
class InductorProgram:
    """A graph to compile, and where its layers are found again.

    Args:
        graph: Takes flat inputs and returns flat outputs; on the CPU.
        marks: Names of layers by the name of a tensor that only they read: the scales of a
            weight, joined ones of several layers, or the codes of an embedding's.
        quantizers: The node that makes codes, by the planned graph's node that simulates it.
        narrowed: What is computed in bfloat16, as `compute_in_bfloat16` names it.
        is_pointwise: Whether it has convolutions whose kernels are of one element.
    """

    graph: fx.GraphModule
    marks: Mapping[str, list[str]]
    quantizers: Mapping[str, fx.Node] = field(repr=False)
    narrowed: Mapping[str, str] = field(default_factory=dict)
    is_pointwise: bool = False


def inductor_program(graph: fx.GraphModule, *, is_bfloat16: bool = False) -> InductorProgram:
    """Rewrite a planned graph so that the compiler finds all it can run on integers.

    Args:
        graph: With chosen precisions; not changed.
        is_bfloat16: Whether float layers and products are computed in bfloat16.

    Returns:
        The graph of `to_decomposed` with `uint8` codes, written as the compiler wants it, where
        linear layers that read the same codes are one.
    """
    rewritten = to_decomposed(graph, signed=False)
    separate_uses(rewritten)
    nodes = {node.name: node for node in rewritten.graph.nodes}
    made = [node for node in rewritten.graph.nodes if node.target is QUANTIZE]
    marks: dict[str, list[str]] = {}
    for layer, _ in layers_of(graph):
        mark = f"codes_{layer.weight}".replace(".", "_")
        if layer.kind != "embedding":
            mark = _scales(nodes[layer.node])
        marks.setdefault(mark, []).append(layer.name)
    for joined, parts in join_linears(rewritten).items():
        marks[joined] = [name for part in parts for name in marks.pop(part)]
    narrowed = compute_in_bfloat16(rewritten) if is_bfloat16 else {}
    rewrite_for_compiler(rewritten)
    move_to_cpu(rewritten)
    rewritten.graph.set_codegen(fx.graph.CodeGen())
    finish(rewritten)
    makers = dict(zip(active_quantizers(graph), made, strict=True))
    is_pointwise = any(
        layer.kind == "conv" and math.prod(layer.weight_shape[2:]) == 1
        for layer, _ in layers_of(graph)
    )
    return InductorProgram(rewritten, marks, makers, narrowed, is_pointwise)


def _scales(layer: fx.Node) -> str:
    """The name of the scales that a layer's weight is dequantized with; empty if it is float."""
    weight = argument(layer, OPERATORS[layer.target].weight)
    if not isinstance(weight, fx.Node) or weight.target is not DEQUANTIZE_WEIGHT:
        return ""
    scales = weight.args[1]
    assert isinstance(scales, fx.Node)
    return str(scales.target)


def dequantized(codes: Tensor, maker: fx.Node) -> Tensor:
    """The real numbers that codes stand for.

    Args:
        codes: What `maker` computed.
        maker: A node that quantizes.
    """
    values: Tensor = DEQUANTIZE(codes, *maker.args[1:])
    return values
