"""Running a graph on flat inputs, node by node where a step needs to look in."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from fxmpq.errors import FxmpqError
from fxmpq.graph.batches import Batch, flat_inputs, graph_device
from fxmpq.graph.state import state_of


class ShapeRecorder(fx.Interpreter):
    """Runs the graph and writes each tensor's shape into its node's metadata."""

    def run_node(self, n: fx.Node) -> object:
        """Run one node and record the shape of its result as `example_shape`."""
        result = super().run_node(n)
        if isinstance(result, Tensor):
            n.meta["example_shape"] = result.shape
        return result


def record_shapes(graph: fx.GraphModule) -> None:
    """Run the example batch and record every node's concrete shape."""
    device = graph_device(graph)
    inputs = [
        leaf.to(device) if isinstance(leaf, Tensor) else leaf for leaf in state_of(graph).example
    ]
    with torch.no_grad():
        ShapeRecorder(graph).run(*inputs, enable_io_processing=False)


def float_outputs(outputs: object) -> list[Tensor]:
    """The floating-point tensors among a graph's flat outputs.

    Args:
        outputs: What the output node holds: a tensor, or nested tuples, lists and dicts.
    """
    if isinstance(outputs, Tensor):
        return [outputs] if outputs.is_floating_point() else []
    if isinstance(outputs, dict):
        outputs = list(outputs.values())
    if isinstance(outputs, (tuple, list)):
        return [tensor for entry in outputs for tensor in float_outputs(entry)]
    return []


def flatten_outputs(outputs: object, samples: int) -> Tensor:
    """Concatenate the floating-point outputs per sample.

    Args:
        outputs: A graph's flat outputs.
        samples: Number of samples in the batch.

    Returns:
        Shape `[samples, values]`; outputs whose first dimension is not a multiple of
        `samples` are left out.

    Raises:
        FxmpqError: If no output is left.
    """
    rows = [
        tensor.reshape(samples, -1)
        for tensor in float_outputs(outputs)
        if tensor.dim() > 0 and tensor.shape[0] % samples == 0
    ]
    if not rows:
        raise FxmpqError(
            "the model returns no floating-point tensor with a batch dimension, so there is "
            "nothing to measure; return the logits or features instead"
        )
    return torch.cat(rows, dim=1)


def run_batch(graph: fx.GraphModule, batch: Batch) -> Sequence[object]:
    """Run a graph on one batch and return its flat outputs, without gradients."""
    inputs = flat_inputs(graph, batch)
    with torch.no_grad():
        result = fx.Interpreter(graph).run(*inputs, enable_io_processing=False)
    return result if isinstance(result, (tuple, list)) else [result]
