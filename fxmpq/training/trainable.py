"""Trainable graphs: a calibrated graph with weights of its own and learned steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, fx, nn

from fxmpq.errors import PrecisionError
from fxmpq.formats import NumberFormat, Precision
from fxmpq.granularity import PerBlock
from fxmpq.graph.attributes import get_tensor, set_tensor
from fxmpq.graph.batches import graph_device
from fxmpq.graph.debug import checked
from fxmpq.graph.state import Group, Layer, copy_graph, require, with_state
from fxmpq.quantizers.learned import LearnedQuantizer, activation_step, weight_step
from fxmpq.quantizers.modules import ActivationQuantizer, BiasCorrection, WeightQuantizer
from fxmpq.quantizers.planned import PlannedQuantizer
from fxmpq.training.loss import check_was_run


def trainable(graph: fx.GraphModule) -> fx.GraphModule:
    """Copy a calibrated graph into one that can be trained, every quantizer off.

    All its floating-point parameters are clones that require gradients, and its quantizers are
    `LearnedQuantizer`s with one step per candidate format and tensor. A weight's steps begin at
    three standard deviations (`weight_step`), an activation's at its calibrated scale. A tensor
    that is never negative keeps codes from 0; one that is (after GELU or a layer norm) keeps
    its calibrated zero points as fixed offsets, so only the step is learned. Bias corrections
    are off, as biases learn. With everything off the copy computes what `graph` does, bit for
    bit, is called like the model and returns the model's output classes.

    What is trained is the graph: batch norms are folded into the weights and dropout is gone,
    so training mode and evaluation mode are the same.

    Args:
        graph: From `calibrate`; not changed.

    Returns:
        The trainable copy; its state names the same groups.

    Raises:
        FxmpqError: If the graph is not calibrated.
        PrecisionError: If a candidate has no single step per tensor: a float or dynamic format,
            or weights in blocks.

    Examples:
        >>> from fxmpq.calibration.calibrate import calibrate
        >>> from fxmpq.graph.trace import trace
        >>> from fxmpq.steps import prepare
        >>> batch = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
        >>> graph = prepare(trace(nn.Linear(3, 2), batch), "reference", candidates=["w4a8"])
        >>> learning = trainable(calibrate(graph, [batch], progress=False))
        >>> sorted(name for name, parameter in learning.named_parameters())
        ['bias', 'quantizers.activation_0.steps.uint8', 'quantizers.weight_weight.steps.int4',
        'weight']
    """
    state = require(graph, stage="calibrated")
    _check_formats(state.groups)
    with torch.inference_mode(False):
        copied = copy_graph(graph)
        own_parameters(copied)
        for group in state.groups:
            for name in group.activation_quantizers:
                quantizer = copied.get_submodule(name)
                assert isinstance(quantizer, ActivationQuantizer)
                copied.add_submodule(name, _learned_activation(quantizer))
            for layer in group.layers:
                _make_weight_learn(copied, layer)
        copied.to(graph_device(graph))
    return checked(with_state(copied, replace(state, choices={})), "trainable", "trainable")


def _check_formats(groups: Sequence[Group]) -> None:
    for group in groups:
        for candidate in group.candidates:
            found = [entry for entry in (candidate.weight, candidate.activation) if entry]
            if any(not e.has_fixed_grid or isinstance(e.granularity, PerBlock) for e in found):
                raise PrecisionError(
                    f"cannot learn the steps of candidate {candidate} of group {group.name!r}: "
                    "training learns one step per tensor, which formats of floats, of blocks and "
                    "of dynamic ranges do not have; prepare with integer formats, such as "
                    "'w4a8' and 'w4ta8'"
                )


def activate(graph: fx.GraphModule, group: Group, precision: Precision) -> None:
    """Set the learned quantizers of a group to a precision, in place; `fp32` switches them off.

    Args:
        graph: From `trainable`.
        group: One of its groups.
        precision: A candidate of the group, or float.
    """
    for _, quantizer, activation in group_quantizers(graph, group):
        quantizer.activate(precision.activation if activation else precision.weight)


def switch_off(graph: fx.GraphModule) -> None:
    """Let a trainable graph compute in float, in place."""
    for quantizer in learned_quantizers(graph).values():
        quantizer.activate(None)


def learned_quantizers(graph: fx.GraphModule) -> dict[str, LearnedQuantizer]:
    """The learned quantizers of a trainable graph by module name, in the order of its modules."""
    return {
        name: module
        for name, module in graph.named_modules()
        if isinstance(module, LearnedQuantizer)
    }


def group_quantizers(
    graph: fx.GraphModule, group: Group
) -> Iterator[tuple[str, LearnedQuantizer, bool]]:
    """Module name, quantizer and whether it is of an activation, once each, of one group."""
    weights = dict.fromkeys(layer.weight_quantizer for layer in group.layers)
    names = [(name, True) for name in group.activation_quantizers]
    for name, is_activation in [*names, *((name, False) for name in weights if name)]:
        quantizer = graph.get_submodule(name)
        assert isinstance(quantizer, LearnedQuantizer)
        yield name, quantizer, is_activation


def begin_steps(graph: fx.GraphModule, groups: Sequence[Group], run: Callable[[], object]) -> None:
    """Begin the steps of some groups anew from the weights as they are, and from one forward pass.

    Weights begin at `weight_step`, activations at `activation_step` of what reaches them, as in
    LSQ and LIMPQ. The quantizers stay switched as they are.

    Args:
        graph: From `trainable`; its steps are changed in place.
        groups: Those whose steps begin anew.
        run: Runs the graph on a batch; called once, without gradients.

    Raises:
        FxmpqError: If `run` does not run the graph.
    """
    magnitudes = _means(graph, run, torch.abs)
    weights = _weights(graph)
    for group in groups:
        for name, quantizer, is_activation in group_quantizers(graph, group):
            for entry in quantizer.formats:
                if is_activation:
                    step = activation_step(magnitudes[name], *quantizer.levels[entry])
                else:
                    step = weight_step(weights[name], entry)
                quantizer.set_step(entry, step)


def tensor_powers(graph: fx.GraphModule, run: Callable[[], object]) -> dict[str, float]:
    """Mean square of every tensor that has a learned quantizer, by the quantizer's module name.

    Args:
        graph: From `trainable`.
        run: Runs the graph on a batch; called once, without gradients.

    Returns:
        Mean squares, in the order of `learned_quantizers`.

    Raises:
        FxmpqError: If `run` does not run the graph.
    """
    return _means(graph, run, torch.square)


def clamp_steps(graph: fx.GraphModule) -> None:
    """Bring every step of a trainable graph back within its bounds.

    Args:
        graph: From `trainable` or `trainable_plan`; changed in place.
    """
    for module in graph.modules():
        if isinstance(module, (LearnedQuantizer, PlannedQuantizer)):
            module.clamp_steps()


def own_parameters(graph: fx.GraphModule) -> None:
    """Replace the parameters, shared by `copy_graph`, by clones that require gradients, in place.

    Each has one name in a graph. Those that are no floating-point tensors get no gradients.
    """
    for name, parameter in list(graph.named_parameters()):
        clone = parameter.detach().clone()
        set_tensor(graph, name, nn.Parameter(clone, clone.is_floating_point()))


def _learned_activation(quantizer: ActivationQuantizer) -> LearnedQuantizer:
    steps: dict[NumberFormat, float] = {}
    levels: dict[NumberFormat, tuple[int, int]] = {}
    peak = 0.0
    for number_format in quantizer.formats:
        found = quantizer.ranges[number_format.name]
        low, high = number_format.qmin - found.zero_point, number_format.qmax - found.zero_point
        steps[number_format], levels[number_format] = found.scale, (low, high)
        peak = max(peak, found.scale * max(-low, high))
    return LearnedQuantizer(quantizer.name, steps, levels, peak)


def _make_weight_learn(graph: fx.GraphModule, layer: Layer) -> None:
    """Give a layer's weight a learned quantizer, once, and switch its bias correction off."""
    if layer.bias_correction is not None:
        correction = graph.get_submodule(layer.bias_correction)
        assert isinstance(correction, BiasCorrection)
        correction.activate(None)
    if layer.weight_quantizer is None:
        return
    quantizer = graph.get_submodule(layer.weight_quantizer)
    if isinstance(quantizer, LearnedQuantizer):
        return
    assert isinstance(quantizer, WeightQuantizer)
    weight = get_tensor(graph, layer.weight).detach()
    steps = {entry: weight_step(weight, entry) for entry in quantizer.formats}
    levels = {entry: (entry.qmin, entry.qmax) for entry in quantizer.formats}
    learned = LearnedQuantizer(quantizer.name, steps, levels, float(weight.abs().max()))
    graph.add_submodule(layer.weight_quantizer, learned)


def _weights(graph: fx.GraphModule) -> dict[str, Tensor]:
    """The weight behind each learned weight quantizer, by the quantizer's module name."""
    return {
        layer.weight_quantizer: get_tensor(graph, layer.weight).detach()
        for group in require(graph, stage="calibrated").groups
        for layer in group.layers
        if layer.weight_quantizer is not None
    }


def _means(
    graph: fx.GraphModule, run: Callable[[], object], measure: Callable[[Tensor], Tensor]
) -> dict[str, float]:
    """Mean of a measure over all that reaches each learned quantizer while `run` runs."""
    totals: dict[str, tuple[float, int]] = {}

    def look(name: str, x: Tensor) -> None:
        total, count = totals.get(name, (0.0, 0))
        totals[name] = total + float(measure(x).mean()) * x.numel(), count + x.numel()

    handles = [
        quantizer.register_forward_pre_hook(
            lambda _, arguments, name=name: look(name, arguments[0])
        )
        for name, quantizer in learned_quantizers(graph).items()
    ]
    try:
        with torch.inference_mode(False), torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    check_was_run(bool(totals) or not handles)
    return {name: totals[name][0] / totals[name][1] for name in learned_quantizers(graph)}
