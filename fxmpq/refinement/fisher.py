"""Fisher weights: how much the model's output minds an error in each value of a tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from fxmpq.errors import FxmpqError, closest
from fxmpq.graph.batches import Batch, flat_inputs
from fxmpq.refinement.outputs import FloatInterpreter, checked_outputs

WEIGHTINGS = ("outputs", "labels")
"""What errors may be weighted by: all of the model's output, or its own loss alone."""


def fisher_weights(
    graph: fx.GraphModule,
    batches: Sequence[Batch],
    nodes: Sequence[fx.Node],
    *,
    weighting: str = "outputs",
    seed: int = 0,
) -> dict[fx.Node, list[Tensor]]:
    """Squared gradients of the float model at some values: how much errors there matter.

    For values `z` and the model's first floating-point output `y` that depends on layers, it
    returns the mean of `(dL/dz)^2` over the first dimension, the samples. (One weight for each
    sample and value, as in BRECQ, took a batch's size times the memory and measured no better.)
    With `outputs`, `L = sum(r * y)` with random signs `r`: the expectation is the diagonal of the
    Gauss-Newton matrix of `||y' - y||^2 / 2`. With `labels`, `L` is the cross entropy to labels
    drawn from `softmax(y)`, the last dimension being classes: the expectation is the diagonal of
    the Fisher information, which says little of samples that the model is sure of. Neither
    needs labels of the data.

    Args:
        graph: Planned; its quantizers are passed by.
        batches: What the model takes.
        nodes: Whose values are weighted.
        weighting: `outputs` or `labels`.
        seed: Of signs or labels.

    Returns:
        For each node a tensor per batch, in the shape of its value but with one sample; batches
        that differ in nothing but the number of samples share one. Cost: one forward and one
        backward pass.

    Raises:
        FxmpqError: If the model returns no such output, or there is no such weighting.
    """
    if weighting not in WEIGHTINGS:
        raise FxmpqError(f"no weighting {weighting!r}; there are {closest(weighting, WEIGHTINGS)}")
    generator = torch.Generator().manual_seed(seed)
    means: dict[fx.Node, _Means] = {node: _Means() for node in nodes}
    for batch in batches:
        with torch.enable_grad():
            runner = _Keeping(graph, nodes)
            outputs = runner.run(*flat_inputs(graph, batch), enable_io_processing=False)
            loss = _own_loss(_answer(outputs), weighting, generator)
            values = [runner.kept[node] for node in nodes]
            # A value that the first output does not read has no say in it.
            gradients = torch.autograd.grad(loss, values, allow_unused=True, materialize_grads=True)
        for node, gradient in zip(nodes, gradients, strict=True):
            means[node].add(gradient)
    return {node: found.per_batch() for node, found in means.items()}


def _answer(outputs: object) -> Tensor:
    """The first floating-point output that what is weighted has a part in."""
    found = next((output for output in checked_outputs(outputs) if output.requires_grad), None)
    if found is None:
        raise FxmpqError(
            "no floating-point output of the model depends on its layers, so nothing says which "
            "errors matter; weigh none of them, with weighting='none'"
        )
    return found


def _own_loss(output: Tensor, weighting: str, generator: torch.Generator) -> Tensor:
    if weighting == "labels":
        rows = output.reshape(-1, output.shape[-1])
        chances = rows.detach().float().softmax(dim=1).cpu()
        labels = torch.multinomial(chances, 1, generator=generator)[:, 0].to(output.device)
        return torch.nn.functional.cross_entropy(rows, labels, reduction="sum")
    signs = torch.randint(2, output.shape, generator=generator) * 2.0 - 1
    return (signs.to(output.device) * output).sum()


class _Means:
    """Means of squares over the first dimension, of batches that are otherwise alike."""

    def __init__(self) -> None:
        self._sums: dict[tuple[int, ...], Tensor] = {}
        self._counts: dict[tuple[int, ...], int] = {}
        self._shapes: list[tuple[int, ...]] = []

    def add(self, gradient: Tensor) -> None:
        rows = gradient if gradient.dim() else gradient[None]
        shape = tuple(rows.shape[1:])
        self._shapes.append(shape)
        self._counts[shape] = self._counts.get(shape, 0) + len(rows)
        self._sums[shape] = self._sums.get(shape, 0) + rows.square().sum(dim=0, keepdim=True)

    def per_batch(self) -> list[Tensor]:
        found = {shape: total / self._counts[shape] for shape, total in self._sums.items()}
        return [found[shape] for shape in self._shapes]


class _Keeping(FloatInterpreter):
    """Runs in float and keeps some values, with gradients to them.

    Args:
        graph: Planned.
        nodes: Whose values to keep.
    """

    def __init__(self, graph: fx.GraphModule, nodes: Sequence[fx.Node]) -> None:
        super().__init__(graph)
        self.kept: dict[fx.Node, Tensor] = {}
        self._nodes = frozenset(nodes)

    def run_node(self, n: fx.Node) -> object:
        """Run one node; gradients begin at the first one kept."""
        result = super().run_node(n)
        if n in self._nodes and isinstance(result, Tensor):
            result = result if result.requires_grad else result.detach().requires_grad_()
            self.kept[n] = result
        return result
