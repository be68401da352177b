"""Calibrate: ranges, scales and bias shifts of every candidate."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, fx

from fxmpq.calibration.observe import Observations
from fxmpq.calibration.options import read_options
from fxmpq.errors import CalibrationError
from fxmpq.formats import Precision
from fxmpq.graph.attributes import get_tensor
from fxmpq.graph.batches import Batch, materialize
from fxmpq.graph.debug import checked
from fxmpq.graph.operators import OPERATORS, argument, output_channels
from fxmpq.graph.state import Group, Layer, copy_graph, require, with_state
from fxmpq.graph.switch import switch_group
from fxmpq.progress import track
from fxmpq.quantizers.histogram import StreamingHistogram
from fxmpq.quantizers.means import MeanInput
from fxmpq.quantizers.modules import ActivationQuantizer, BiasCorrection, WeightQuantizer
from fxmpq.quantizers.ranges import RANGES
from fxmpq.quantizers.rule import RuleChoice, RuleText
from fxmpq.quantizers.weight_scale import WEIGHT_SCALES


def calibrate(
    graph: fx.GraphModule,
    batches: Iterable[Batch],
    *,
    ranges: RuleText = "mse",
    weight_scales: RuleText = "mse",
    bias_correction: bool = True,
    progress: bool = True,
    **options: object,
) -> fx.GraphModule:
    """Find the ranges of every candidate format in one float pass over the data.

    A rule finds activation ranges per tensor, on streaming histograms, and another the scales of
    weights; bias corrections remove the mean that weight rounding takes from each channel of a
    layer's output. Tensors that the target must store with one scale
    (`TargetRules.shared_ranges`) get one range, found on the values of all, and those that it reads
    as signed codes (`TargetRules.symmetric_inputs_of`) one that is symmetric. Memory does not grow
    with the data, and whatever the rules and however many the formats, the data is passed once; not
    at all where nothing is to be found on it, as without bias correction where activations are
    float or have dynamic ranges.

    Args:
        graph: From `prepare`; copied, not changed. One that was calibrated before is calibrated
            anew: its choices and what was refined are gone.
        batches: What the model takes: tensors, tuples of arguments, or mappings.
        ranges: Rule of the activation ranges: `minmax`, `percentile`, `mse`, `kl` or `sigma`, or
            a mapping with its options, as `{"rule": "percentile", "percentile": 99.9}`.
        weight_scales: Rule of the weight scales, in the same form: `minmax` or `mse`.
        bias_correction: Whether quantized layers get corrected biases.
        progress: Whether to show a progress bar.
        **options: Of the rule of `ranges` where that is given by name, as `percentile=99.9`.

    Returns:
        The calibrated graph, with every quantizer off.

    Raises:
        FxmpqError: If a rule or an option is unknown, or has no legal value.
        CalibrationError: If there are no batches, or a weight or activation is NaN or
            infinite (naming the layer).
        BatchError: If a batch does not fit the model.

    Examples:
        >>> import torch, fxmpq
        >>> batches = [torch.randn(8, 4, generator=torch.Generator().manual_seed(0))]
        >>> graph = fxmpq.trace(torch.nn.Sequential(torch.nn.Linear(4, 2)), batches[0])
        >>> graph = fxmpq.prepare(graph, "reference")
        >>> graph = calibrate(graph, batches, ranges="percentile", percentile=99.9, progress=False)
    """
    chosen = read_options(ranges, weight_scales, bias_correction, options)
    state = require(graph, stage="prepared")
    found = materialize(batches)
    _check_weights(graph, state.groups)
    calibrated = copy_graph(graph)
    for group in state.groups:
        switch_group(calibrated, group, Precision())
    with torch.inference_mode(False), torch.no_grad():
        observations = Observations(calibrated)
        if observations.histograms or (bias_correction and observations.means):
            observations.observe(track(found, "calibrating", shown=progress))
        for name, histogram in observations.histograms.items():
            _set_ranges(calibrated, name, histogram, chosen.ranges)
        nodes = {node.name: node for node in calibrated.graph.nodes}
        for group in state.groups:
            for layer in group.layers:
                _set_weight_scales(calibrated, layer, chosen.weight_scales)
                if layer.bias_correction is not None:
                    mean_input = observations.means[layer.node] if bias_correction else None
                    _set_bias_shifts(calibrated, layer, nodes[layer.node], mean_input)
    state = replace(state, calibrated=True, calibration=chosen, choices={}, refinements=())
    return checked(with_state(calibrated, state), "calibrate")


def _check_weights(graph: fx.GraphModule, groups: Sequence[Group]) -> None:
    for group in groups:
        for layer in group.layers:
            if not torch.isfinite(get_tensor(graph, layer.weight)).all():
                raise CalibrationError(
                    f"the weight of layer {layer.name!r} holds NaN or infinite values; check the "
                    "checkpoint it was loaded from"
                )


def _set_ranges(
    graph: fx.GraphModule, name: str, histogram: StreamingHistogram, choice: RuleChoice
) -> None:
    quantizer = graph.get_submodule(name)
    assert isinstance(quantizer, ActivationQuantizer)
    find = partial(RANGES[choice.rule].find, is_symmetric=quantizer.is_symmetric)
    options = dict(choice.options)
    quantizer.ranges = {
        number_format.name: find(histogram, number_format, **options)
        for number_format in quantizer.formats
        if number_format.dynamic is None
    }


def _set_weight_scales(graph: fx.GraphModule, layer: Layer, choice: RuleChoice) -> None:
    if layer.weight_quantizer is None:
        return
    quantizer = graph.get_submodule(layer.weight_quantizer)
    assert isinstance(quantizer, WeightQuantizer)
    weight = get_tensor(graph, layer.weight)
    find, options = WEIGHT_SCALES[choice.rule].find, dict(choice.options)
    scales = find(weight, quantizer.formats, quantizer.axis, **options)
    for number_format, scale in zip(quantizer.formats, scales, strict=True):
        quantizer.set_scale(number_format, scale)
        if quantizer.stored_codes(number_format) is not None:
            quantizer.set_codes(number_format, None)


def _set_bias_shifts(
    graph: fx.GraphModule, layer: Layer, node: fx.Node, mean_input: MeanInput | None
) -> None:
    """Set the shifts of every weight format, or take those there are away without a mean."""
    assert layer.weight_quantizer is not None and layer.bias_correction is not None
    quantizer = graph.get_submodule(layer.weight_quantizer)
    correction = graph.get_submodule(layer.bias_correction)
    assert isinstance(quantizer, WeightQuantizer) and isinstance(correction, BiasCorrection)
    weight = get_tensor(graph, layer.weight)
    for number_format in quantizer.formats:
        if mean_input is None:
            if correction.shift(number_format) is not None:
                correction.set_shift(number_format, None)
            continue
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
    total = torch.zeros(output_channels(node, weight.shape), device=weight.device)
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
