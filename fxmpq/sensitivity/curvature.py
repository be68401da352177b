"""Curvature: Hutchinson's traces of a loss's Hessian, one block per quantized tensor."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fxmpq.errors import CalibrationError, FxmpqError
from fxmpq.formats import Precision
from fxmpq.graph.batches import graph_device
from fxmpq.graph.state import copy_graph, require
from fxmpq.graph.switch import switch_group
from fxmpq.quantizers.modules import ActivationQuantizer
from fxmpq.training.loss import LossFunction, batch_samples, check_was_run, loss_value, on_device

Part = Sequence[str]


class Curvature:
    """Draws of the mean Hessian traces of a loss, with respect to what a graph can quantize.

    A block is the tensor behind one quantizer: a weight (one block, however many layers and
    calls read it, so that the terms between its calls count) or an activation. Hooks on the
    quantizers of a private copy of the graph, all of them off, note these tensors as the loss
    runs the copy, which is called like the graph and returns the same.

    Fused attention has no second derivative, so attention runs unfused. Memory: the values,
    gradients and second gradients of one batch.

    Args:
        graph: A calibrated graph; not changed.
        loss: `loss(model, batch)`, the mean over samples, twice differentiable.
        activations: Whether activations are blocks, or weights only.

    Attributes:
        weights: Blocks that are weights, by module name of their quantizers.
        activations: Blocks that are activations, likewise.

    Examples:
        >>> import fxmpq
        >>> model = nn.Linear(2, 3, bias=False)
        >>> unit_vectors = torch.eye(2)
        >>> graph = fxmpq.prepare(fxmpq.trace(model, unit_vectors), "reference")
        >>> graph = fxmpq.calibrate(graph, [unit_vectors])
        >>> found = Curvature(
        ...     graph, lambda net, x: net(x).square().sum(1).mean(), activations=False
        ... )
        >>> found.draw([unit_vectors], [found.weights], seed=0, number=0)
        [1.0]
    """

    def __init__(self, graph: fx.GraphModule, loss: LossFunction, *, activations: bool) -> None:
        groups = require(graph, stage="calibrated").groups
        self._graph = copy_graph(graph)
        self._loss = loss
        self._noted: dict[str, list[Tensor]] = {}
        found = [layer.weight_quantizer for group in groups for layer in group.layers]
        self.weights = tuple(dict.fromkeys(name for name in found if name is not None))
        values = [name for group in groups for name in group.activation_quantizers]
        self.activations = tuple(values) if activations else ()
        for group in groups:
            switch_group(self._graph, group, Precision())
        for name in self.weights:
            hook = functools.partial(self._note_weight, name)
            self._graph.get_submodule(name).register_forward_hook(hook)
        for name in self.activations:
            hook = functools.partial(self._note_activation, name)
            self._graph.get_submodule(name).register_forward_hook(hook)

    def draw(
        self, batches: Sequence[Any], parts: Sequence[Part], *, seed: int, number: int
    ) -> list[float]:
        """Draw the mean trace of every block in some parts once, by Hutchinson's estimator.

        With random signs `z` over the values of all blocks of one part, and `H` the Hessian of
        the loss with respect to these, `z_l . (H z)_l` has mean `Tr(H_ll)` for each block `l`:
        what the other blocks of the part add, `z_l . (H_lm z_m)`, has mean zero, but it adds
        to the variance. Signs are new for each batch, which is unbiased too, and lets the
        errors of batches average out.

        Cost: per batch a forward pass and its gradient, and per part a Hessian-vector product.

        Args:
            batches: What the loss takes; each counts by its samples.
            parts: Blocks whose signs are drawn at once.
            seed: Of all draws.
            number: Of this draw.

        Returns:
            `Tr(H_ll) / N_l` for the blocks of all parts in order, with `N_l` the number of
            values: of a weight, or of an activation per sample, whose trace is the mean over
            the samples.

        Raises:
            FxmpqError: If the loss is no scalar, does not run the model, or has no second
                derivative.
            CalibrationError: If a trace is not finite.
        """
        entropy = np.random.SeedSequence([seed % 2**64, number]).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(entropy[0]))
        with torch.inference_mode(False), torch.enable_grad():
            found = _mean(batches, lambda batch: self._traces(batch, parts, generator))
        if not np.isfinite(found).all():
            raise CalibrationError(
                "the loss has a second derivative that is NaN or infinite on these batches; check "
                "the data's normalisation, the labels and the model's weights"
            )
        return found

    def noise(self, batches: Sequence[Any]) -> list[float]:
        """The rounding noise of every activation block in each of its formats.

        Cost: one forward pass.

        Args:
            batches: What the loss takes; each counts by its samples.

        Returns:
            `E ||Q(x) - x||^2` per sample, for all formats of a block, block by block.
        """
        with torch.inference_mode(False), torch.no_grad():
            return _mean(batches, self._noise)

    def _noise(self, batch: object) -> list[float]:
        self._run(batch)
        samples = batch_samples(batch)
        found = []
        for name in self.activations:
            quantizer = self._graph.get_submodule(name)
            assert isinstance(quantizer, ActivationQuantizer)
            for number_format in quantizer.formats:
                errors = (quantizer.quantize(x, number_format) - x for x in self._noted[name])
                total = sum(float(error.double().square().sum()) for error in errors)
                found.append(total / samples)
        return found

    def _traces(
        self, batch: object, parts: Sequence[Part], generator: torch.Generator
    ) -> list[float]:
        samples = batch_samples(batch)
        found = []
        # Attention is differentiated twice, for which its fused kernels have no rule.
        with sdpa_kernel(SDPBackend.MATH):
            loss = self._run(batch)
            tensors = [x for part in parts for name in part for x in self._noted[name]]
            slopes = dict(zip(tensors, _slopes(loss, tensors), strict=True))
            for part in parts:
                own = [x for name in part for x in self._noted[name]]
                products = _products(own, [slopes[x] for x in own], generator)
                for name in part:
                    terms = [products.pop(0) for _ in self._noted[name]]
                    values = sum(x.numel() for x in self._noted[name])
                    share = samples if name in self.activations else 1
                    found.append(sum(terms) * share / values)
        self._noted.clear()
        return found

    def _run(self, batch: object) -> Tensor:
        """The loss of one batch; what the quantizers hand on is noted."""
        self._noted = {}
        device = graph_device(self._graph)
        loss = loss_value(self._loss, self._graph, on_device(batch, device))
        check_was_run(bool(self._noted))
        return loss

    def _note_weight(
        self, name: str, _module: nn.Module, _inputs: object, output: Tensor
    ) -> Tensor:
        """One leaf a run, so that all calls of the model see the same weight."""
        if name not in self._noted:
            self._noted[name] = [output.detach().requires_grad_()]
        return self._noted[name][0]

    def _note_activation(
        self, name: str, _module: nn.Module, _inputs: object, output: Tensor
    ) -> Tensor:
        """A tensor of its own, of which all readers of the quantizer, and only they, are part."""
        is_computed = output.requires_grad
        own = output.view_as(output) if is_computed else output.detach().requires_grad_()
        self._noted.setdefault(name, []).append(own)
        return own


def _mean(batches: Sequence[Any], measure: Callable[[Any], Sequence[float]]) -> list[float]:
    """The mean over batches of some numbers, each batch counting by its samples."""
    counts = [batch_samples(batch) for batch in batches]
    rows = [
        np.asarray(measure(batch)) * count for batch, count in zip(batches, counts, strict=True)
    ]
    return [float(number) for number in np.sum(rows, axis=0) / sum(counts)]


def _slopes(loss: Tensor, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """Gradients of the loss that can be differentiated again."""
    if not loss.requires_grad:
        raise FxmpqError(
            "the loss has no gradient with respect to the model's outputs, so it has no Hessian; "
            "compute it from the outputs with differentiable operators, and neither .item(), "
            ".detach() nor torch.no_grad(), for example torch.nn.functional.cross_entropy"
        )
    with _differentiating():
        return torch.autograd.grad(loss, tensors, create_graph=True, materialize_grads=True)


def _products(
    tensors: Sequence[Tensor], slopes: Sequence[Tensor], generator: torch.Generator
) -> list[float]:
    """`z_l . (H z)_l` for each tensor, with random signs `z` over all of them."""
    signs = [(torch.randint(0, 2, x.shape, generator=generator) * 2.0 - 1).to(x) for x in tensors]
    # A gradient that depends on nothing is constant, and its row of the Hessian 0.
    varying = [(slope, z) for slope, z in zip(slopes, signs, strict=True) if slope.requires_grad]
    if not varying:
        return [0.0] * len(tensors)
    with _differentiating():
        rows = torch.autograd.grad(
            [slope for slope, _ in varying],
            tensors,
            grad_outputs=[z for _, z in varying],
            retain_graph=True,
            materialize_grads=True,
        )
    return [float((z * row).double().sum()) for z, row in zip(signs, rows, strict=True)]


@contextmanager
def _differentiating() -> Iterator[None]:
    """Says what can be done about an operator without a derivative."""
    try:
        yield
    except RuntimeError as error:
        if "derivative" not in str(error) and "differentiate" not in str(error):
            raise
        raise FxmpqError(
            f"the loss cannot be differentiated twice: {error}. Replace that operator in the "
            "model or the loss, or take a method without second derivatives, as 'projected'"
        ) from error
