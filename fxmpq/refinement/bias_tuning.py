"""Bias tuning: all biases at once, trained to keep what the float model answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, fx

from fxmpq.errors import FxmpqError
from fxmpq.graph.batches import Batch, flat_inputs
from fxmpq.graph.operators import output_channels
from fxmpq.graph.state import Refinement, require
from fxmpq.refinement.best_seen import BestSeen
from fxmpq.refinement.norm_reestimation import has_channel_scales
from fxmpq.refinement.outputs import (
    FloatInterpreter,
    checked_outputs,
    model_outputs,
    output_error,
)
from fxmpq.refinement.units import Units
from fxmpq.refinement.views import QuantizedLayer
from fxmpq.training.loss import divergences

LOSSES = ("kl", "mse")

Outputs = Sequence[Tensor]
Loss = Callable[[Outputs, Outputs], Tensor]
"""Called with a batch's outputs as planned and in float; a scalar."""


def bias_tuning(
    graph: fx.GraphModule,
    batches: Sequence[Batch],
    *,
    units: Units,
    epochs: int = 4,
    learning_rate: float = 3e-3,
    scales: bool = True,
    loss: str | None = None,
    seed: int = 0,
) -> list[Refinement]:
    """Train the biases of all quantized layers together, so that the model's outputs stay.

    Minimises, with Adam and gradients straight through the quantizers,

    - `kl`: the sum over samples of `sum_c p_c log(p_c / q_c)`, with `p` and `q` the softmax of
      the float and the planned model's logits (Hubara et al. 2020, arXiv:2006.10518);
    - `mse`: the squared error of all outputs over the float outputs' power.

    A bias moves in units of its layer's root mean square output, a scale by a factor, so that
    one learning rate fits all; it falls to 0 over the run by a cosine. After each epoch the loss
    over all batches is taken, and the state where it was least is kept, so that it is never
    higher than before. Integer codes stay as they are.

    Cost: one float pass, and per epoch a training pass with gradients and a planned pass, together
    some five float passes.

    Args:
        graph: Planned; changed in place.
        batches: What the model takes.
        units: Keeps what was found.
        epochs: How often every batch is trained on, at least 1.
        learning_rate: Of Adam, positive.
        scales: Whether scales per channel are trained too.
        loss: `kl`, of the first output with classes that the plan changes; `mse`; or `None` for
            `kl` where that is a matrix of samples and at least two classes, else `mse`.
        seed: Of the batches' order.

    Returns:
        One entry for the whole model; none if no quantized layer has a bias.

    Raises:
        FxmpqError: If an option has no legal value, the loss is `kl` and no output has classes,
            or the model returns no floating-point tensor.
    """
    _check(epochs, learning_rate, loss)
    layers = _layers(graph)
    if not layers:
        return []
    modules = _modules(layers, scales=scales)

    def compute() -> tuple[float, float]:
        recorder = _Recorder(graph, layers)
        expected = [recorder.outputs(batch) for batch in batches]
        planned = model_outputs(graph, batches[0], quantized=True)
        training = _Training(graph, batches, expected, _loss_of(loss, expected, planned))
        parameters = _biases(layers, recorder) + (_scales(layers) if scales else [])
        before = output_error(graph, batches, expected)
        best = BestSeen(graph, modules, training.evaluate())
        training.run(parameters, best, epochs, learning_rate, seed)
        best.restore()
        return before, output_error(graph, batches, expected)

    before, after = units.unit("bias_tuning", graph, modules, compute)
    return [Refinement("bias_tuning", "", before, after)]


def _check(epochs: int, learning_rate: float, loss: str | None) -> None:
    if epochs < 1:
        raise FxmpqError(f"epochs must be at least 1; found {epochs}")
    if not 0 < learning_rate < math.inf:
        raise FxmpqError(f"learning_rate must be a positive finite number; found {learning_rate}")
    if loss is not None and loss not in LOSSES:
        raise FxmpqError(f"no loss {loss!r}; there are {' and '.join(LOSSES)}, or None to choose")


def _layers(graph: fx.GraphModule) -> list[QuantizedLayer]:
    """All calls of quantized weights whose bias can be corrected."""
    nodes = {node.name: node for node in graph.graph.nodes}
    found = [
        QuantizedLayer(graph, group, layer, nodes[layer.node])
        for group in require(graph, stage="calibrated").groups
        for layer in group.layers
    ]
    return [layer for layer in found if layer.is_quantized and layer.correction is not None]


def _modules(layers: Sequence[QuantizedLayer], *, scales: bool) -> list[str]:
    """Names of what is trained."""
    names: dict[str | None, None] = {layer.layer.bias_correction: None for layer in layers}
    if scales:
        names.update(dict.fromkeys(layer.layer.weight_quantizer for layer in layers))
    return [name for name in names if name is not None]


class _Recorder(FloatInterpreter):
    """Runs a planned graph in float and notes how large its layers' outputs are."""

    def __init__(self, graph: fx.GraphModule, layers: Sequence[QuantizedLayer]) -> None:
        super().__init__(graph)
        self._graph = graph
        self._powers = {layer.node.name: 0.0 for layer in layers}
        self._counts = {layer.node.name: 0 for layer in layers}

    def run_node(self, n: fx.Node) -> object:
        """Run one node; a layer's output is measured."""
        found = super().run_node(n)
        if n.name in self._powers:
            assert isinstance(found, Tensor)
            self._powers[n.name] += float(found.square().sum(dtype=torch.float64))
            self._counts[n.name] += found.numel()
        return found

    def outputs(self, batch: Batch) -> Outputs:
        """The float model's outputs."""
        with torch.no_grad():
            inputs = flat_inputs(self._graph, batch)
            return checked_outputs(self.run(*inputs, enable_io_processing=False))

    def magnitude(self, layer: QuantizedLayer) -> float:
        """Root mean square of a layer's output over what was run; 1 if it is all zeros."""
        name = layer.node.name
        return math.sqrt(self._powers[name] / max(self._counts[name], 1)) or 1.0


class _Parameter:
    """A tensor that training moves, and how it gets into its module."""

    def __init__(self, size: int, like: Tensor, write: Callable[[Tensor], None]) -> None:
        self.change = torch.zeros(size, dtype=like.dtype, device=like.device, requires_grad=True)
        self._write = write

    def write(self, *, trained: bool) -> None:
        """Put the present value into the module, with gradients while it is trained."""
        self._write(self.change if trained else self.change.detach())


def _biases(layers: Sequence[QuantizedLayer], recorder: _Recorder) -> list[_Parameter]:
    """Every layer's shift, moved in units of its output."""
    return [_bias(layer, recorder.magnitude(layer)) for layer in layers]


def _bias(layer: QuantizedLayer, unit: float) -> _Parameter:
    correction, number_format, weight = layer.correction, layer.number_format, layer.weight
    assert correction is not None and number_format is not None
    channels = output_channels(layer.node, weight.shape)
    shift = correction.shift(number_format)
    start = weight.new_zeros(channels) if shift is None else shift.clone()

    def write(change: Tensor) -> None:
        correction.set_shift(number_format, start + unit * change)

    return _Parameter(channels, weight, write)


def _scales(layers: Sequence[QuantizedLayer]) -> list[_Parameter]:
    """The logarithm of a factor for each channel's scales, once for a weight."""
    by_weight = {layer.layer.weight: layer for layer in reversed(layers)}
    return [
        _scale(layer)
        for layer in by_weight.values()
        if layer.number_format is not None and has_channel_scales(layer.number_format)
    ]


def _scale(layer: QuantizedLayer) -> _Parameter:
    quantizer, number_format, weight = layer.quantizer, layer.number_format, layer.weight
    assert quantizer is not None and number_format is not None
    quantizer.set_codes(number_format, quantizer.codes(weight, number_format))
    scale = quantizer.scale(number_format).clone()
    shape = [-1] + [1] * (scale.dim() - 1)

    def write(change: Tensor) -> None:
        quantizer.set_scale(number_format, scale * change.exp().reshape(shape))

    return _Parameter(weight.shape[quantizer.axis], weight, write)


class _Training:
    """Trains parameters of a planned graph on its batches.

    Args:
        graph: With chosen precisions.
        batches: What the model takes.
        expected: The float model's outputs, per batch.
        loss: Compares outputs.
    """

    def __init__(
        self,
        graph: fx.GraphModule,
        batches: Sequence[Batch],
        expected: Sequence[Outputs],
        loss: Loss,
    ) -> None:
        self._graph = graph
        self._batches = batches
        self._expected = expected
        self._compare = loss

    def evaluate(self) -> float:
        """The loss over all batches."""
        with torch.no_grad():
            return sum(float(self._loss(index)) for index in range(len(self._batches)))

    def run(
        self,
        parameters: Sequence[_Parameter],
        best: BestSeen,
        epochs: int,
        learning_rate: float,
        seed: int,
    ) -> None:
        """Train, and offer the state after each epoch."""
        changes = [parameter.change for parameter in parameters]
        optimizer = torch.optim.Adam(changes, lr=learning_rate)
        steps = epochs * len(self._batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        generator = torch.Generator().manual_seed(seed)
        for _ in range(epochs):
            for index in torch.randperm(len(self._batches), generator=generator).tolist():
                with torch.enable_grad():
                    for parameter in parameters:
                        parameter.write(trained=True)
                    # Not backward(), which would leave gradients at the user's own parameters.
                    gradients = torch.autograd.grad(self._loss(index), changes, allow_unused=True)
                for change, gradient in zip(changes, gradients, strict=True):
                    change.grad = gradient
                optimizer.step()
                schedule.step()
            for parameter in parameters:
                parameter.write(trained=False)
            best.offer(self.evaluate())

    def _loss(self, index: int) -> Tensor:
        found = model_outputs(self._graph, self._batches[index], quantized=True)
        return self._compare(found, self._expected[index])


def _loss_of(name: str | None, expected: Sequence[Outputs], planned: Outputs) -> Loss:
    """The loss that was asked for, or that suits the outputs; a sum over samples."""
    ranks = range(1, 8) if name == "kl" else (2,)
    logits = [i for i, y in enumerate(expected[0]) if y.dim() in ranks and y.shape[-1] > 1]
    logits = [i for i in logits if not torch.equal(planned[i], expected[0][i])]
    if name != "mse" and logits:
        return partial(_divergence, position=logits[0])
    if name == "kl":
        shapes = ", ".join(str(list(output.shape)) for output in expected[0])
        raise FxmpqError(
            "the loss 'kl' needs an output that the plan changes, with at least two classes in its "
            f"last dimension; found {shapes}; loss='mse' takes any"
        )
    power = sum(float(output.square().sum()) for batch in expected for output in batch)
    return partial(_squared_error, power=power or 1.0)


def _divergence(found: Outputs, expected: Outputs, *, position: int) -> Tensor:
    return divergences(expected[position], found[position]).sum()


def _squared_error(found: Outputs, expected: Outputs, *, power: float) -> Tensor:
    pairs = zip(found, expected, strict=True)
    return torch.stack([(q - y).square().sum() for q, y in pairs]).sum() / power
