"""A quantized layer as the rewrites see it: its codes, scales, bias and shape as a product."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from fxmpq.formats import Precision
from fxmpq.granularity import PerBlock
from fxmpq.graph.attributes import get_tensor
from fxmpq.graph.operators import OPERATORS, argument
from fxmpq.graph.state import Layer
from fxmpq.quantizers.modules import WeightQuantizer
from fxmpq.targets.cuda.shape_rules import ProductShape
from fxmpq.targets.lowering import quantizer_of


@dataclass(frozen=True)
class Window:
    """What a convolution reads for one output position.

    Args:
        kernel: Sizes, one a dimension of space.
        stride: Steps between positions.
        padding: Zeros around the input, as `pad` takes them: before and behind, the last
            dimension first.
        dilation: Steps between the values that are read.
        groups: Groups of channels.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @property
    def positions(self) -> int:
        """How many positions a kernel has."""
        return math.prod(self.kernel)


@dataclass(frozen=True)
class WeightedLayer:
    """A quantized layer of a lowered graph.

    Args:
        layer: As `prepare` found it.
        node: Its call.
        precision: Its own.
        codes: Of its weight, in the weight's shape; bit patterns of E4M3 are `uint8`.
        scale: `[1]`, `[channels]` or `[channels, blocks]`.
        bias: Stored, or `None`.
        window: Of a convolution.
        dtype: In which the layer computes.
    """

    layer: Layer
    node: fx.Node
    precision: Precision
    codes: Tensor
    scale: Tensor
    bias: Tensor | None
    window: Window | None
    dtype: torch.dtype

    @property
    def rows(self) -> Tensor:
        """The codes as a matrix, `[out, inner]`, in the order of `patches`."""
        return in_rows(self.codes)

    @property
    def shape(self) -> ProductShape:
        """The matrix product that it is."""
        outer, inner = self.rows.shape
        if self.window is None:
            return ProductShape(inner, outer)
        return ProductShape(inner, outer, self.window.groups, self.window.positions)

    @property
    def block(self) -> int | None:
        """How many weights share a scale, if they do in blocks."""
        weight = self.precision.weight
        granularity = None if weight is None else weight.granularity
        return granularity.size if isinstance(granularity, PerBlock) else None


def in_rows(weight: Tensor) -> Tensor:
    """A weight as a matrix that multiplies rows of `patches`, or of a linear layer's inputs.

    Args:
        weight: `[out, in, *kernel]`.

    Returns:
        `[out, product of kernel * in]`.

    Examples:
        >>> in_rows(torch.arange(6).reshape(1, 2, 3)).tolist()
        [[0, 3, 1, 4, 2, 5]]
    """
    return weight.movedim(1, -1).reshape(weight.shape[0], -1)


def read_layer(
    graph: fx.GraphModule, node: fx.Node, layer: Layer, precision: Precision
) -> WeightedLayer | None:
    """Read a layer of a lowered graph.

    Args:
        graph: From `lower`.
        node: The layer's call.
        layer: As `prepare` found it.
        precision: Its own.

    Returns:
        The layer, or `None` if its weight is float.
    """
    operator = OPERATORS[node.target]
    quantizer = quantizer_of(graph, argument(node, operator.weight))
    if not isinstance(quantizer, WeightQuantizer) or quantizer.active is None:
        return None
    weight = get_tensor(graph, quantizer.name).detach()
    codes = quantizer.codes(weight, quantizer.active)
    bias = _stored(argument(node, operator.bias))
    return WeightedLayer(
        layer=layer,
        node=node,
        precision=precision,
        codes=codes,
        scale=quantizer.scale(quantizer.active),
        bias=None if bias is None else get_tensor(graph, str(bias.target)).detach(),
        window=_window(node, codes) if operator.kind == "conv" else None,
        dtype=weight.dtype,
    )


def has_computed_bias(node: fx.Node) -> bool:
    """Whether what a layer adds is computed, not stored."""
    bias = argument(node, OPERATORS[node.target].bias)
    return bias is not None and _stored(bias) is None


def _stored(value: object) -> fx.Node | None:
    """A node that reads a stored tensor, or `None` of anything else."""
    return value if isinstance(value, fx.Node) and value.op == "get_attr" else None


def _window(node: fx.Node, codes: Tensor) -> Window:
    kernel = tuple(codes.shape[2:])
    stride, dilation = (_sizes(argument(node, place), len(kernel), 1) for place in (3, 5))
    groups = argument(node, 6)
    padding = _padding(argument(node, 4), kernel, dilation)
    return Window(kernel, stride, padding, dilation, groups if isinstance(groups, int) else 1)


def _sizes(value: object, rank: int, default: int) -> tuple[int, ...]:
    """An option of a convolution, one number a dimension of space."""
    if value is None:
        return (default,) * rank
    numbers = tuple(value) if isinstance(value, Sequence) else (value,)
    return numbers * rank if len(numbers) == 1 else numbers


def _padding(value: object, kernel: tuple[int, ...], dilation: tuple[int, ...]) -> tuple[int, ...]:
    """What is added before and behind, the last dimension first."""
    if value == "same":
        totals = [gap * (size - 1) for size, gap in zip(kernel, dilation, strict=True)]
        pairs = [(total // 2, total - total // 2) for total in totals]
    else:
        wanted = None if value == "valid" else value
        pairs = [(size, size) for size in _sizes(wanted, len(kernel), 0)]
    return tuple(size for pair in reversed(pairs) for size in pair)
