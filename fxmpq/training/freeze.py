"""Freeze: what a trained graph has learned, back in the quantizers that converters read."""

from __future__ import annotations

import torch
from torch import fx, nn

from fxmpq.graph.attributes import get_tensor, set_tensor
from fxmpq.graph.state import Layer, require
from fxmpq.quantizers.modules import ActivationQuantizer, BiasCorrection, WeightQuantizer
from fxmpq.quantizers.planned import PlannedQuantizer
from fxmpq.quantizers.ranges import ActivationRange
from fxmpq.quantizers.weight_scale import mse_weight_scales
from fxmpq.training.planned import LearnedShift


def freeze(trained: fx.GraphModule, graph: fx.GraphModule) -> None:
    """Give a planned graph what its trainable copy has learned, in place.

    Weights and biases become the trained ones, bias shifts go back to zero (but those that were
    trained as such), learned steps become scales and ranges, and the codes they give are stored.
    The graph then computes what `trained` does, bit for bit. Formats that the plan does not use
    get the scales of least squared error on the trained weights, without codes or shifts.

    Args:
        trained: From `trainable_plan(graph)`; not changed.
        graph: Its tensors are replaced, none is written to.
    """
    state = require(graph, stage="calibrated")
    with torch.inference_mode(False), torch.no_grad():
        _keep_parameters(trained, graph)
        for group in state.groups:
            for name in group.activation_quantizers:
                _keep_range(trained.get_submodule(name), graph.get_submodule(name))
            for layer in group.layers:
                _keep_bias(trained, graph, layer)
                _keep_weight(trained, graph, layer)


def _keep_parameters(trained: fx.GraphModule, graph: fx.GraphModule) -> None:
    """Replace all parameters that do not belong to quantizers by copies of the trained ones."""
    learned = dict(trained.named_parameters())
    for name, parameter in list(graph.named_parameters()):
        kept = nn.Parameter(learned[name].detach().clone(), parameter.requires_grad)
        set_tensor(graph, name, kept)


def _keep_range(learned: nn.Module, quantizer: nn.Module) -> None:
    if isinstance(learned, PlannedQuantizer):
        assert isinstance(quantizer, ActivationQuantizer)
        found = ActivationRange(float(learned.step), learned.zero_point)
        # A copied graph shares nothing of its modules, but a range of another run stays true.
        quantizer.ranges = {**quantizer.ranges, learned.number_format.name: found}


def _keep_bias(trained: fx.GraphModule, graph: fx.GraphModule, layer: Layer) -> None:
    if layer.bias_correction is None:
        return
    correction = graph.get_submodule(layer.bias_correction)
    learned = trained.get_submodule(layer.bias_correction)
    assert isinstance(correction, BiasCorrection)
    for name, _ in list(correction.named_buffers()):
        correction.register_buffer(name, None)
    if isinstance(learned, LearnedShift):
        assert correction.active is not None
        correction.set_shift(correction.active, learned.shift.detach().clone())


def _keep_weight(trained: fx.GraphModule, graph: fx.GraphModule, layer: Layer) -> None:
    if layer.weight_quantizer is None:
        return
    quantizer = graph.get_submodule(layer.weight_quantizer)
    learned = trained.get_submodule(layer.weight_quantizer)
    assert isinstance(quantizer, WeightQuantizer)
    if isinstance(learned, PlannedQuantizer):
        quantizer.set_scale(learned.number_format, learned.step)
    weight = get_tensor(graph, layer.weight).detach()
    # The scales of a float format stay what they were, and maybe where they were.
    quantizer.to(weight.device)
    unused = [entry for entry in quantizer.formats if entry != quantizer.active]
    scales = mse_weight_scales(weight, unused, quantizer.axis)
    for number_format, scale in zip(unused, scales, strict=True):
        quantizer.set_scale(number_format, scale)
    for number_format in quantizer.formats:
        quantizer.set_codes(number_format, None)
    if quantizer.active is not None:
        quantizer.set_codes(quantizer.active, quantizer.codes(weight, quantizer.active))
