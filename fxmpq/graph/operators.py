"""The weighted operators fxmpq quantizes: one table, a line an operator."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import fx

from fxmpq.graph import experts, linear_forms  # noqa: F401  (registers torch.ops.fxmpq)

aten = torch.ops.aten
own = torch.ops.fxmpq

MacsRule = Callable[[torch.Size, torch.Size, torch.Size], int]


@dataclass(frozen=True)
class Operator:
    """Where a weighted operator keeps its operands.

    Args:
        kind: The name targets use for it.
        input: Position of the activation among the arguments.
        weight: Position of the weight.
        bias: Position of the bias, or `None` if it never has one.
        channel_axis: The weight's output-channel dimension.
        macs: Multiply-accumulates from the input's, the output's and the weight's shape.
        quantizes_input: Whether its input is a real-valued activation.
        sharing: Position of the number of groups whose output channels lie behind one another
            along the same `channel_axis` of the weight, and so share scales; `None` where every
            output channel has weights of its own there.
    """

    kind: str
    input: int
    weight: int
    bias: int | None
    channel_axis: int
    macs: MacsRule
    quantizes_input: bool = True
    sharing: int | None = None


def _macs_per_output(source: torch.Size, output: torch.Size, weight: torch.Size) -> int:
    """Each output value is a dot product with one output channel's weights."""
    return output.numel() * math.prod(weight[1:])


def _macs_per_input(source: torch.Size, output: torch.Size, weight: torch.Size) -> int:
    """Each input value meets all weights of its channel."""
    return source.numel() * math.prod(weight[1:])


def _no_macs(source: torch.Size, output: torch.Size, weight: torch.Size) -> int:
    """A table look-up multiplies nothing."""
    return 0


_CONV = Operator("conv", 0, 1, 2, 0, _macs_per_output)
# Of a weight [in, out / groups, *kernel], whose scales the groups share.
_CONV_TRANSPOSE = Operator("conv_transpose", 0, 1, 2, 1, _macs_per_input, sharing=6)
_LINEAR = Operator("linear", 0, 1, 2, 0, _macs_per_output)
# Of a weight [experts * out, in].
_EXPERTS = Operator("experts", 0, 1, None, 0, _macs_per_output)
_EMBEDDING = Operator("embedding", 1, 0, None, 0, _no_macs, quantizes_input=False)

OPERATORS: Mapping[object, Operator] = {
    aten.conv1d.default: _CONV,
    aten.conv1d.padding: _CONV,
    aten.conv2d.default: _CONV,
    aten.conv2d.padding: _CONV,
    aten.conv3d.default: _CONV,
    aten.conv3d.padding: _CONV,
    aten.conv_transpose1d.default: _CONV_TRANSPOSE,
    aten.conv_transpose2d.input: _CONV_TRANSPOSE,
    aten.conv_transpose3d.input: _CONV_TRANSPOSE,
    aten.linear.default: _LINEAR,
    own.linear.default: _LINEAR,
    own.grouped_linear.default: _EXPERTS,
    own.batched_linear.default: _EXPERTS,
    aten.embedding.default: _EMBEDDING,
}

KINDS: tuple[str, ...] = tuple(dict.fromkeys(operator.kind for operator in OPERATORS.values()))

# Take `(input, state, weights and biases, ...)` and return more than one tensor.
RECURRENT: frozenset[object] = frozenset(
    {aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input}
)

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
    aten.mv.default: "a product with a vector is computed in float",
    aten.tensordot.default: "tensordot is computed in float",
    aten.bilinear.default: "a bilinear form is computed in float",
    **dict.fromkeys(RECURRENT, "recurrent layers are computed in float"),
}


def operator_of(node: fx.Node) -> Operator | None:
    """The table's entry for a node, or `None`."""
    return OPERATORS.get(node.target) if node.op == "call_function" else None


def argument(node: fx.Node, position: int | None) -> object:
    """A positional argument of a node, or `None` where it was left out."""
    if position is None or position >= len(node.args):
        return None
    return node.args[position]


def output_channels(node: fx.Node, weight: torch.Size) -> int:
    """Output channels of a weighted operator: how many values its bias has.

    Args:
        node: A call of an operator of the table.
        weight: The shape of its weight.
    """
    operator = OPERATORS[node.target]
    groups = argument(node, operator.sharing)
    return weight[operator.channel_axis] * (groups if isinstance(groups, int) else 1)
