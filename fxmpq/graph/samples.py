"""Where the samples of a batch lie in the tensors of a running graph."""

from __future__ import annotations

import math

import torch
from torch import Tensor, fx

from fxmpq.graph.batches import fixed_size
from fxmpq.graph.state import state_of

aten = torch.ops.aten

# Operators that keep the flat order of values while they change the shape.
_RESHAPES = frozenset(
    {
        aten.view.default,
        aten.reshape.default,
        aten._unsafe_view.default,
        aten.flatten.using_ints,
        aten.unflatten.int,
        aten.contiguous.default,
        aten.clone.default,
        aten.squeeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.unsqueeze.default,
    }
)
_PERMUTATIONS = frozenset(
    {
        aten.permute.default,
        aten.transpose.int,
        aten.t.default,
        aten.movedim.int,
        aten.movedim.intlist,
        aten.swapaxes.default,
    }
)


# Operators that bring rows into another order, and so those of other samples together.
_GATHERS = frozenset(
    {
        aten.index.Tensor,
        aten.index_select.default,
        aten.gather.default,
        aten.index_put.default,
        aten.scatter.src,
        aten.sort.default,
        aten.argsort.default,
        aten.argsort.stable,
        aten.cumsum.default,
        aten.flip.default,
        aten.roll.default,
    }
)


class SampleStrides:
    """Follows the samples through a graph as it runs.

    Most tensors hold one sample after the other, but not all: attention modules put positions
    first, `[T, N, E]`, and flatten that to `[T * N, E]`. With stride `s`, the flat value `i`
    of a tensor belongs to sample `(i // s) % N`.

    The sizes that the export left free tell which dimension is the batch; where it was merged
    with another one, the operators since then tell the order. A graph of fixed batch size has
    its samples first wherever the first dimension is a multiple of their number.

    Args:
        graph: A traced graph.
    """

    def __init__(self, graph: fx.GraphModule) -> None:
        self._dynamic = state_of(graph).dynamic
        self._samples = 1
        self._found: dict[fx.Node, tuple[int | None, torch.Size]] = {}
        self._batch_sizes = set()
        for node in graph.graph.find_nodes(op="placeholder"):
            value = node.meta.get("val")
            if isinstance(value, Tensor) and value.dim() > 0 and fixed_size(value.shape[0]) is None:
                self._batch_sizes.add(str(value.shape[0]))

    def start(self, samples: int) -> None:
        """Begin with a batch of this many samples."""
        self._samples = samples
        self._found.clear()

    def record(self, node: fx.Node, result: object) -> None:
        """Note a node's result, its inputs having been noted before."""
        if isinstance(result, Tensor):
            stride = self._stride(node, result.shape)
            # An empty tensor, as what rotary embeddings leave unrotated may be, has no samples.
            if not result.numel() or (stride and result.numel() % (stride * self._samples)):
                stride = None
            self._found[node] = (stride, result.shape)

    def stride(self, node: fx.Node) -> int | None:
        """Stride of the samples in a noted result; `None` if they share it or it is unknown."""
        return self._found[node][0]

    def _stride(self, node: fx.Node, shape: torch.Size) -> int | None:
        value = node.meta.get("val")
        if node.op == "get_attr":
            return None
        if not self._dynamic or not isinstance(value, Tensor) or value.dim() != len(shape):
            is_first = len(shape) > 0 and shape[0] % self._samples == 0
            return max(shape.numel() // self._samples, 1) if is_first else None
        names = [str(size) for size in value.shape]
        for axis, name in enumerate(names):
            if name in self._batch_sizes:
                return shape[axis + 1 :].numel()
        if not any(size in name for size in self._batch_sizes for name in names):
            return None
        inherited = (self._inherited(node, source, shape) for source in node.all_input_nodes)
        return next((stride for stride in inherited if stride is not None), None)

    def _inherited(self, node: fx.Node, source: fx.Node, shape: torch.Size) -> int | None:
        """The stride that follows from an input whose samples are known."""
        stride, before = self._found.get(source, (None, torch.Size()))
        if stride is None or node.target in _PERMUTATIONS or node.target in _GATHERS:
            return None
        if node.target in _RESHAPES:
            return stride
        # The first dimension is kept, and what lies behind it may have become another size.
        inside, outside = before[1:].numel(), shape[1:].numel()
        if before[:1] != shape[:1] or stride % inside:
            return None
        return stride // inside * outside


def sum_per_sample(values: Tensor, stride: int, samples: int) -> Tensor:
    """Sum all values of each sample.

    Args:
        values: Any shape.
        stride: Of its samples.
        samples: How many there are.

    Returns:
        Shape `[samples]`.
    """
    return values.reshape(-1, samples, stride).sum(dim=(0, 2))


def samples_first(values: Tensor, stride: int, samples: int, row: int) -> Tensor | None:
    """Order the rows of a tensor by sample.

    Args:
        values: Any shape; its last `row` dimensions make one row.
        stride: Of its samples.
        samples: How many there are.
        row: How many dimensions belong together, 0 or more.

    Returns:
        Shape `[rows, *values.shape[-row:]]`, with all rows of the first sample in front;
        `None` if the samples lie inside the rows.
    """
    tail = values.shape[values.dim() - row :]
    inside = math.prod(tail)
    if stride % inside:
        return None
    split = values.reshape(-1, samples, stride // inside, *tail)
    return split.transpose(0, 1).reshape(-1, *tail)
