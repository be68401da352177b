"""The weighted operators fxmpq quantizes: one table, a line an operator."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import fx

aten = torch.ops.aten

MacsRule = Callable[[torch.Size, torch.Size], int]


@dataclass(frozen=True)
class Operator:
    """Where a weighted operator keeps its operands.

    Args:
        kind: The name targets use for it.
        input: Position of the activation among the arguments.
        weight: Position of the weight.
        bias: Position of the bias, or `None` if it never has one.
        channel_axis: The weight's output-channel dimension.
        macs: Multiply-accumulates from the output's and the weight's shape.
        quantizes_input: Whether its input is a real-valued activation.
    """

    kind: str
    input: int
    weight: int
    bias: int | None
    channel_axis: int
    macs: MacsRule
    quantizes_input: bool = True


def _macs_per_output(output: torch.Size, weight: torch.Size) -> int:
    """Each output value is a dot product with one output channel's weights."""
    return output.numel() * math.prod(weight[1:])


def _no_macs(output: torch.Size, weight: torch.Size) -> int:
    """A table look-up multiplies nothing."""
    return 0


_CONV = Operator("conv", 0, 1, 2, 0, _macs_per_output)
_LINEAR = Operator("linear", 0, 1, 2, 0, _macs_per_output)
_EMBEDDING = Operator("embedding", 1, 0, None, 0, _no_macs, quantizes_input=False)

OPERATORS: Mapping[object, Operator] = {
    aten.conv1d.default: _CONV,
    aten.conv1d.padding: _CONV,
    aten.conv2d.default: _CONV,
    aten.conv2d.padding: _CONV,
    aten.conv3d.default: _CONV,
    aten.conv3d.padding: _CONV,
    aten.linear.default: _LINEAR,
    aten.embedding.default: _EMBEDDING,
}

KINDS: tuple[str, ...] = tuple(dict.fromkeys(operator.kind for operator in OPERATORS.values()))

# Operators that multiply activations or weights but have no quantized form here: their
# multiply-accumulates count as float, and reports say that they stay so.
FLOAT_MATMULS: Mapping[object, str] = {
    aten.scaled_dot_product_attention.default: "fused attention is computed in float",
    aten.matmul.default: "a product of two activations is computed in float",
    aten.bmm.default: "a product of two activations is computed in float",
    aten.mm.default: "this matrix product is computed in float",
    aten.addmm.default: "this matrix product is computed in float",
    aten.baddbmm.default: "a product of two activations is computed in float",
    aten.einsum.default: "einsum is computed in float",
    aten.conv_transpose1d.default: "transposed convolution is computed in float",
    aten.conv_transpose2d.input: "transposed convolution is computed in float",
    aten.conv_transpose3d.input: "transposed convolution is computed in float",
}


def operator_of(node: fx.Node) -> Operator | None:
    """The table's entry for a node, or `None`."""
    return OPERATORS.get(node.target) if node.op == "call_function" else None


def argument(node: fx.Node, position: int | None) -> object:
    """A positional argument of a node, or `None` where it was left out."""
    if position is None or position >= len(node.args):
        return None
    return node.args[position]
