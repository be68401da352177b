"""Observing a float graph: histograms of stored tensors and mean inputs of layers."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, fx, nn

from fxmpq.errors import CalibrationError
from fxmpq.graph.batches import Batch, flat_inputs
from fxmpq.graph.layers import place_of
from fxmpq.graph.operators import OPERATORS, argument
from fxmpq.graph.run import float_outputs
from fxmpq.graph.state import GraphState, require
from fxmpq.quantizers.histogram import StreamingHistogram
from fxmpq.quantizers.means import MeanInput
from fxmpq.quantizers.modules import ActivationQuantizer


class Observations(fx.Interpreter):
    """Runs a prepared graph in float and keeps statistics of what passes.

    Args:
        graph: A prepared graph, every quantizer off.

    Attributes:
        histograms: Per name of an activation quantizer with a range to be found; those of one
            range share theirs.
        means: Per layer node name, for layers with a bias correction.
    """

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        state = require(graph, stage="prepared")
        self.histograms = {
            name: StreamingHistogram()
            for group in state.groups
            for name in group.activation_quantizers
            if _has_range(graph.get_submodule(name))
        }
        for shared in state.shared_ranges:
            names = [name for name in shared if name in self.histograms]
            self.histograms.update(dict.fromkeys(names, StreamingHistogram()))
        self.means = {
            layer.node: MeanInput()
            for group in state.groups
            for layer in group.layers
            if layer.bias_correction is not None
        }
        self._ranks = {
            layer.node: len(layer.weight_shape) for group in state.groups for layer in group.layers
        }
        self._owners = _owners(state)
        self._graph = graph
        self._batch = 0

    def observe(self, batches: Iterable[Batch]) -> None:
        """Run every batch and collect.

        Raises:
            CalibrationError: If there is no batch, or an activation is NaN or infinite,
                naming the first layer where it is.
        """
        for batch in batches:
            self._batch += 1
            inputs = flat_inputs(self._graph, batch)
            with torch.no_grad():
                outputs = self.run(*inputs, enable_io_processing=False)
            for output in float_outputs(outputs):
                if not torch.isfinite(output).all():
                    raise CalibrationError(
                        f"the model's output holds NaN or infinite values in calibration batch "
                        f"{self._batch}, first in {_first_not_finite(self._graph, inputs)}; "
                        f"{_REMEDY}"
                    )
        if self._batch == 0:
            raise CalibrationError(
                "the calibration data is empty; pass at least one batch of what the model takes"
            )

    def run_node(self, n: fx.Node) -> object:
        """Run one node, looking at what enters a layer or passes a quantizer."""
        result = super().run_node(n)
        if n.op == "call_module" and str(n.target) in self.histograms:
            assert isinstance(result, Tensor)
            self._count(str(n.target), n, result)
        elif n.name in self.means:
            source = argument(n, OPERATORS[n.target].input)
            assert isinstance(source, fx.Node)
            value = self.env[source]
            # A layer also takes one sample without a batch dimension, such as a parameter.
            self.means[n.name].update(value[None] if value.dim() < self._ranks[n.name] else value)
        return result

    def _count(self, name: str, node: fx.Node, value: Tensor) -> None:
        try:
            self.histograms[name].update(value)
        except FloatingPointError as error:
            source = node.all_input_nodes[0]
            what = "the model's input" if source.op == "placeholder" else "the output of"
            raise CalibrationError(
                f"{what} {place_of(source)!r}, which layer {self._owners[name]!r} reads or "
                f"computes, holds NaN or infinite values in calibration batch {self._batch}; "
                f"{_REMEDY}"
            ) from error


def _has_range(quantizer: nn.Module) -> bool:
    """Whether a format of an activation quantizer has a range that does not change."""
    assert isinstance(quantizer, ActivationQuantizer)
    return any(number_format.dynamic is None for number_format in quantizer.formats)


_REMEDY = "check the data's normalisation and the model's weights"


def _owners(state: GraphState) -> dict[str, str]:
    """A layer's or product's name per activation quantizer."""
    owners = {name: group.name for group in state.groups for name in group.activation_quantizers}
    for group in state.groups:
        for layer in group.layers:
            if layer.input_quantizer is not None:
                owners[layer.input_quantizer] = layer.name
    return owners


def _first_not_finite(graph: fx.GraphModule, inputs: list[object]) -> str:
    """Where a run first goes wrong: NaN if there is any, since masks may rightly be infinite."""
    checker = _FiniteChecker(graph)
    with torch.no_grad():
        checker.run(*inputs, enable_io_processing=False)
    node = checker.first_nan or checker.first_infinite
    assert node is not None
    kinds = {"placeholder": "the model's input", "get_attr": "its stored tensor"}
    if node.op in kinds:
        return f"{kinds[node.op]} {str(node.target)!r}"
    return repr(place_of(node))


class _FiniteChecker(fx.Interpreter):
    """Notes the first nodes whose results are not finite."""

    first_nan: fx.Node | None = None
    first_infinite: fx.Node | None = None

    def run_node(self, n: fx.Node) -> object:
        """Run one node and look at its result."""
        result = super().run_node(n)
        for tensor in float_outputs(result):
            if self.first_nan is None and torch.isnan(tensor).any():
                self.first_nan = n
            if self.first_infinite is None and torch.isinf(tensor).any():
                self.first_infinite = n
        return result
