"""Planned graphs that train: weights, biases and steps begin where calibration ended."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, fx, nn

from fxmpq.errors import FxmpqError
from fxmpq.formats import Precision
from fxmpq.graph.attributes import get_tensor, set_tensor
from fxmpq.graph.batches import graph_device
from fxmpq.graph.debug import checked
from fxmpq.graph.operators import output_channels
from fxmpq.graph.state import GraphState, Layer, copy_graph, require
from fxmpq.graph.switch import switch_group
from fxmpq.quantizers.codes import dequantize, nearest_codes
from fxmpq.quantizers.modules import ActivationQuantizer, BiasCorrection, WeightQuantizer
from fxmpq.quantizers.planned import planned_quantizer
from fxmpq.training.trainable import own_parameters


class LearnedShift(nn.Module):
    """A shift that trains, in the place of a bias correction whose layer has no bias of its own.

    Args:
        name: The layer's name.
        shift: Where it begins, shape `[channels]`.
    """

    def __init__(self, name: str, shift: Tensor) -> None:
        super().__init__()
        self.name = name
        self.shift = nn.Parameter(shift.detach().clone())

    def forward(self, bias: Tensor | None) -> Tensor:
        """Return the bias, shape `[channels]` or `None`, with the shift added."""
        return self.shift if bias is None else bias + self.shift


def trainable_plan(graph: fx.GraphModule) -> fx.GraphModule:
    """Copy a planned graph into one that can be trained, and that computes the same at first.

    All its floating-point parameters are clones that require gradients. Quantizers that the plan
    uses become `PlannedQuantizer`s, beginning with the scales and ranges that they have: a step
    for each scale of a weight, one for an activation, or for all that share a range
    (`PassingQuantizer`s for float formats, whose scales stay). A bias correction becomes part of
    its layer's bias; where a layer has none, or shares it, the shift itself trains
    (`LearnedShift`). Codes do not train: a weight whose stored codes are not the nearest ones, as
    after `gptq`, begins at the numbers that they stand for.

    Batch norms are folded into the weights and dropout is gone, so training mode and evaluation
    mode are the same. It is called like the model. Every parameter takes part in every pass, as
    training on several devices wants it.

    Args:
        graph: With chosen precisions; not changed.

    Returns:
        The trainable copy, with the same state; `freeze` turns it back.

    Raises:
        FxmpqError: If no plan is applied.

    Examples:
        >>> import fxmpq
        >>> batch = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
        >>> graph = fxmpq.prepare(fxmpq.trace(nn.Linear(3, 2), batch), "reference")
        >>> graph = fxmpq.calibrate(graph, [batch], bias_correction=False, progress=False)
        >>> graph = fxmpq.apply(graph, {"weight": "w4a8"})
        >>> learning = trainable_plan(graph)
        >>> torch.equal(learning(batch), graph(batch))
        True
        >>> sorted(name for name, _ in learning.named_parameters())
        ['bias', 'quantizers.activation_0.ratio', 'quantizers.weight_weight.ratio', 'weight']
    """
    state = check_planned(graph)
    with torch.inference_mode(False):
        copied = copy_graph(graph)
        own_parameters(copied)
        for group in state.groups:
            for name in group.activation_quantizers:
                quantizer = copied.get_submodule(name)
                if isinstance(quantizer, ActivationQuantizer) and quantizer.active is not None:
                    copied.add_submodule(name, planned_quantizer(quantizer, graph_device(graph)))
            for layer in group.layers:
                _let_weight_learn(copied, layer)
        for names in state.shared_ranges:
            for name in names[1:]:
                copied.add_submodule(name, copied.get_submodule(names[0]))
        _let_biases_learn(copied, state)
    return checked(copied, "trainable_plan", "trainable")


def float_copy(graph: fx.GraphModule) -> fx.GraphModule:
    """Copy a graph with every quantizer off: the float model, with parameters of its own.

    Args:
        graph: Calibrated; not changed.
    """
    with torch.inference_mode(False):
        copied = copy_graph(graph)
        own_parameters(copied)
    for group in require(copied, stage="calibrated").groups:
        switch_group(copied, group, Precision())
    return copied.eval().requires_grad_(False)


def check_planned(graph: fx.GraphModule) -> GraphState:
    """The state of a graph whose precisions are chosen.

    Raises:
        FxmpqError: If they are not.
    """
    state = require(graph, stage="calibrated")
    if not state.choices:
        raise FxmpqError(
            "there is no plan to train: every quantizer of the graph is off. Give a plan, from "
            "fxmpq.solve or as {group: precision}, or a graph from fxmpq.apply"
        )
    return state


def _let_weight_learn(graph: fx.GraphModule, layer: Layer) -> None:
    if layer.weight_quantizer is None:
        return
    quantizer = graph.get_submodule(layer.weight_quantizer)
    # A weight that two layers share has a learned one already.
    if not isinstance(quantizer, WeightQuantizer):
        return
    _begin_at_codes(graph, layer.weight, quantizer)
    for number_format in quantizer.formats:
        quantizer.set_codes(number_format, None)
    if quantizer.active is not None:
        learned = planned_quantizer(quantizer, graph_device(graph))
        graph.add_submodule(layer.weight_quantizer, learned)


def _begin_at_codes(graph: fx.GraphModule, name: str, quantizer: WeightQuantizer) -> None:
    """Replace a weight by what its stored codes stand for, unless they are its nearest ones."""
    found, weight = quantizer.active, get_tensor(graph, name)
    stored = None if found is None else quantizer.stored_codes(found)
    if found is None or stored is None or not isinstance(weight, nn.Parameter):
        return
    scale = quantizer.spread_scale(weight, found)
    if not torch.equal(stored, nearest_codes(weight.detach(), scale, found)):
        set_tensor(graph, name, nn.Parameter(dequantize(stored, scale, found)))


def _let_biases_learn(graph: fx.GraphModule, state: GraphState) -> None:
    """Add every active shift to its layer's own bias, or let it learn where there is none.

    A bias that the target stores as an integer begins at it, and trains as a real number.
    """
    nodes = {node.name: node for node in graph.graph.nodes}
    modules: dict[str, nn.Module] = dict(graph.named_modules())
    calls = {str(node.target): node for node in nodes.values() if node.op == "call_module"}
    reads: Counter[str] = Counter()
    for node in nodes.values():
        if node.op == "get_attr":
            reads[str(node.target)] += len(node.users)
    for layer in (layer for group in state.groups for layer in group.layers):
        correction = modules.get(layer.bias_correction or "")
        if not isinstance(correction, BiasCorrection):
            continue
        assert layer.bias_correction is not None
        shift = correction.added
        # What the state of a graph in training holds does not depend on where it began.
        for name, _ in list(correction.named_buffers()):
            correction.register_buffer(name, None)
        if correction.active is None:
            continue
        bias = calls[layer.bias_correction].args[0]
        if isinstance(bias, fx.Node) and bias.op == "get_attr" and reads[str(bias.target)] == 1:
            if shift is not None:
                value = get_tensor(graph, str(bias.target)).detach() + shift
                set_tensor(graph, str(bias.target), nn.Parameter(value))
            correction.activate(None)
            continue
        if shift is None:
            weight = get_tensor(graph, layer.weight)
            shift = weight.new_zeros(output_channels(nodes[layer.node], weight.shape))
        graph.add_submodule(layer.bias_correction, LearnedShift(correction.name, shift))
