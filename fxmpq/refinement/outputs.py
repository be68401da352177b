"""A planned graph's outputs, in float and as planned, and how far they are apart."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from fxmpq.errors import FxmpqError
from fxmpq.graph.batches import Batch, flat_inputs
from fxmpq.graph.run import float_outputs
from fxmpq.refinement.relative_error import relative_error


def checked_outputs(outputs: object) -> list[Tensor]:
    """The floating-point tensors among a graph's outputs, of which there has to be one.

    Args:
        outputs: What the output node holds.

    Raises:
        FxmpqError: If there is none.
    """
    found = float_outputs(outputs)
    if not found:
        raise FxmpqError(
            "the model returns no floating-point tensor, so nothing says which errors matter; "
            "return the logits or features too, or refine layer by layer, with 'gptq' or 'light'"
        )
    return found


class FloatInterpreter(fx.Interpreter):
    """Runs a planned graph with every quantizer passed by: the float model's values."""

    def call_module(
        self,
        target: object,  # noqa: ARG002  (as fx.Interpreter calls it)
        args: tuple[object, ...],
        kwargs: dict[str, object],  # noqa: ARG002
    ) -> object:
        """Return what a quantizer or a bias correction was given."""
        return args[0]


def model_outputs(graph: fx.GraphModule, batch: Batch, *, quantized: bool) -> list[Tensor]:
    """The floating-point tensors that a planned graph returns for one batch.

    Gradients flow to whatever requires them if they are enabled.

    Args:
        graph: With chosen precisions.
        batch: What the model takes.
        quantized: Whether as planned, or in float.

    Returns:
        In the order of the model's outputs.

    Raises:
        FxmpqError: If there are none.
    """
    runner = fx.Interpreter(graph) if quantized else FloatInterpreter(graph)
    return checked_outputs(runner.run(*flat_inputs(graph, batch), enable_io_processing=False))


def output_error(
    graph: fx.GraphModule, batches: Sequence[Batch], expected: Sequence[Sequence[Tensor]]
) -> float:
    """Relative squared error of a planned graph's outputs: `sum (y_q - y)^2 / sum y^2`.

    Args:
        graph: With chosen precisions.
        batches: What the model takes.
        expected: The float model's outputs, per batch.

    Returns:
        The error over all batches and outputs together.
    """

    def join(values: Sequence[Tensor]) -> Tensor:
        return torch.cat([value.reshape(-1) for value in values])

    with torch.no_grad():
        return relative_error(
            lambda batch: join(model_outputs(graph, batches[batch], quantized=True)),
            lambda batch: join(expected[batch]),
            len(batches),
        )
