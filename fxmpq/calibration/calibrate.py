"""Calibrate: ranges, scales and bias shifts of every candidate."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, fx

from fxmpq.calibration.observe import Observations
from fxmpq.errors import CalibrationError
from fxmpq.graph.attributes import get_tensor
from fxmpq.graph.batches import Batch, materialize
from fxmpq.graph.operators import OPERATORS, argument
from fxmpq.graph.state import Group, Layer, copy_graph, require, with_state
from fxmpq.progress import track
from fxmpq.quantizers.means import MeanInput
from fxmpq.quantizers.modules import ActivationQuantizer, BiasCorrection, WeightQuantizer
from fxmpq.quantizers.ranges import mse_activation_range
from fxmpq.quantizers.weight_scale import mse_weight_scales


def calibrate(
    graph: fx.GraphModule,
    batches: Iterable[Batch],
    *,
    bias_correction: bool = True,
    progress: bool = True,
) -> fx.GraphModule:
    """Find the ranges of every candidate format in one float pass over the data.

    Weight scales minimise the squared error per channel; activation ranges minimise it per
    tensor, on streaming histograms; bias corrections remove the mean that weight rounding
    takes from each channel of a layer's output. Memory does not grow with the data.

    Args:
        graph: From `prepare`; copied, not changed.
        batches: What the model takes: tensors, tuples of arguments, or mappings.
        bias_correction: Whether quantized layers get corrected biases.
        progress: Whether to show a progress bar.

    Returns:
        The calibrated graph, still with every quantizer off.

    Raises:
        CalibrationError: If there are no batches, or a weight or activation is NaN or
            infinite (naming the layer).
        BatchError: If a batch does not fit the model.
    """
    state = require(graph, stage="prepared")
    found = materialize(batches)
    _check_weights(graph, state.groups)
    calibrated = copy_graph(graph)
    with torch.inference_mode(False), torch.no_grad():
        observations = Observations(calibrated)
        observations.observe(track(found, "calibrating", shown=progress))
        for name, histogram in observations.histograms.items():
            quantizer = calibrated.get_submodule(name)
            assert isinstance(quantizer, ActivationQuantizer)
            quantizer.ranges = {
                number_format.name: mse_activation_range(histogram, number_format)
                for number_format in quantizer.formats
            }
        nodes = {node.name: node for node in calibrated.graph.nodes}
        for group in state.groups:
            for layer in group.layers:
                _set_weight_scales(calibrated, layer)
                if bias_correction and layer.bias_correction is not None:
                    mean_input = observations.means[layer.node]
                    _set_bias_shifts(calibrated, layer, nodes[layer.node], mean_input)
    return with_state(calibrated, replace(state, calibrated=True))


def _check_weights(graph: fx.GraphModule, groups: Sequence[Group]) -> None:
    for group in groups:
        for layer in group.layers:
            if not torch.isfinite(get_tensor(graph, layer.weight)).all():
                raise CalibrationError(
                    f"the weight of layer {layer.name!r} holds NaN or infinite values; check the "
                    "checkpoint it was loaded from"
                )


def _set_weight_scales(graph: fx.GraphModule, layer: Layer) -> None:
    if layer.weight_quantizer is None:
        return
    quantizer = graph.get_submodule(layer.weight_quantizer)
    assert isinstance(quantizer, WeightQuantizer)
    weight = get_tensor(graph, layer.weight)
    scales = mse_weight_scales(weight, quantizer.formats, quantizer.axis)
    for number_format, scale in zip(quantizer.formats, scales, strict=True):
        quantizer.set_scale(number_format, scale)


def _set_bias_shifts(
    graph: fx.GraphModule, layer: Layer, node: fx.Node, mean_input: MeanInput
) -> None:
    assert layer.weight_quantizer is not None and layer.bias_correction is not None
    quantizer = graph.get_submodule(layer.weight_quantizer)
    correction = graph.get_submodule(layer.bias_correction)
    assert isinstance(quantizer, WeightQuantizer) and isinstance(correction, BiasCorrection)
    weight = get_tensor(graph, layer.weight)
    for number_format in quantizer.formats:
        error = quantizer.quantize(weight, number_format) - weight
        correction.set_shift(number_format, -mean_output(node, error, mean_input))


def mean_output(node: fx.Node, weight: Tensor, mean_input: MeanInput) -> Tensor:
    """Mean output per channel of a weighted operator without bias, on the mean input.

    `E[op(x, W)] = op(E[x], W)` since the operator is linear in `x`; inputs of several shapes
    are weighted by how many outputs they make.

    Args:
        node: The operator's call; its further arguments (stride, padding) are used.
        weight: Stands in for the operator's weight.
        mean_input: Of the operator's input.

    Returns:
        Shape `[channels]`.
    """
    operator = OPERATORS[node.target]
    assert operator.bias is not None and callable(node.target)
    channel_axis = -1 if operator.kind == "linear" else 1
    total = torch.zeros(weight.shape[0], device=weight.device)
    positions = 0
    for inputs, samples in mean_input.totals():
        args = list(node.args)
        args[operator.input] = inputs.unsqueeze(0) / samples
        args[operator.weight] = weight
        if argument(node, operator.bias) is not None:
            args[operator.bias] = None
        output = node.target(*args, **node.kwargs).transpose(channel_axis, 0).flatten(1)
        total += output.mean(dim=1) * samples * output.shape[1]
        positions += samples * output.shape[1]
    return total / positions
