"""The names that target rules call operators by, and what kinds of operators there are."""

from __future__ import annotations

import torch
from torch import fx

from fxmpq.graph.layers import is_real_tensor
from fxmpq.graph.operators import KINDS, OPERATORS

MEETINGS: tuple[str, ...] = ("add", "cat")
"""Operators where tensors of several layers meet."""

MOVEMENTS: frozenset[str] = frozenset(
    {
        "_unsafe_view",
        "alias",
        "chunk",
        "clone",
        "contiguous",
        "detach",
        "expand",
        "expand_as",
        "flatten",
        "flip",
        "movedim",
        "narrow",
        "permute",
        "pixel_shuffle",
        "pixel_unshuffle",
        "repeat",
        "repeat_interleave",
        "reshape",
        "reshape_as",
        "roll",
        "select",
        "slice",
        "split",
        "split_with_sizes",
        "squeeze",
        "swapaxes",
        "swapdims",
        "t",
        "transpose",
        "unbind",
        "unflatten",
        "unsqueeze",
        "view",
        "view_as",
    }
)
"""Operators that only select, repeat or reorder values."""

POOLINGS: frozenset[str] = frozenset(
    f"{name}{size}d"
    for name in ("max_pool", "avg_pool", "adaptive_max_pool", "adaptive_avg_pool")
    for size in (1, 2, 3)
)
"""Operators whose results lie between the values that they read."""

ACTIVATIONS: frozenset[str] = frozenset(
    {
        "celu",
        "elu",
        "gelu",
        "hardsigmoid",
        "hardswish",
        "hardtanh",
        "leaky_relu",
        "mish",
        "prelu",
        "relu",
        "relu6",
        "selu",
        "sigmoid",
        "silu",
        "softplus",
        "tanh",
    }
)
"""Functions of one value each that networks have behind their layers."""


def operator_name(node: fx.Node) -> str | None:
    """What rules call an operator: a layer's kind, as `conv`, else its name in ATen, as `relu`.

    Args:
        node: Of a canonical or prepared graph.

    Returns:
        The name; `None` for what is no operator, such as an input or a stored tensor.

    Examples:
        >>> import fxmpq
        >>> graph = fxmpq.trace(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU()),
        ...     torch.ones(2, 2))
        >>> [name for name in map(operator_name, graph.graph.nodes) if name]
        ['linear', 'relu']
    """
    if node.op != "call_function":
        return None
    if node.target in OPERATORS:
        return OPERATORS[node.target].kind
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name.rpartition("::")[2]
    return getattr(node.target, "__name__", None)


def is_operator_name(name: str) -> bool:
    """Whether there is a kind of layer or an ATen operator of this name.

    Examples:
        >>> is_operator_name("conv"), is_operator_name("gelu"), is_operator_name("gleu")
        (True, True, False)
    """
    return name in KINDS or (name.isidentifier() and hasattr(torch.ops.aten, name))


def met_tensors(node: fx.Node) -> list[fx.Node]:
    """The real-valued tensors that meet in an operator, in order: an add's two, all of a `cat`.

    Args:
        node: Its stored or computed operands count, numbers do not.
    """
    operands: object = node.args[:2]
    if operator_name(node) == "cat":
        operands = node.args[0]
    assert isinstance(operands, (tuple, list))
    return [arg for arg in operands if isinstance(arg, fx.Node) and is_real_tensor(arg)]
