"""The exact sweep: one group at a time, measured at the network's output."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, fx

from fxmpq.formats import Precision
from fxmpq.graph.batches import Batch, batch_size, flat_inputs
from fxmpq.graph.run import flatten_outputs
from fxmpq.graph.state import Group, copy_graph, require
from fxmpq.graph.switch import switch_group
from fxmpq.sensitivity.sensitivity import Sensitivity
from fxmpq.sensitivity.signal import check_signal


def sqnr(graph: fx.GraphModule, batches: Iterable[Batch]) -> Sensitivity:
    """Measure the output noise of every (group, precision), the rest of the network in float.

    The value is `sum_n ||y_n(g, c) - y_n||^2 / sum_n ||y_n||^2` over all floating-point
    outputs, the inverse of the SQNR as a ratio (phase 1 of Pandey et al. 2023,
    arXiv:2302.05397, scored on the network's output).

    Cost: one forward pass per (group, precision), of which only the nodes downstream of the
    group are run again; the float values of one batch are kept in memory. Needs no labels.

    Args:
        graph: A calibrated graph.
        batches: What the model takes.

    Returns:
        Sensitivity without projections.
    """
    state = require(graph, stage="calibrated")
    sweep = _Sweep(copy_graph(graph))
    noise: dict[tuple[str, str], float] = defaultdict(float)
    signal = 0.0
    with torch.inference_mode(False), torch.no_grad():
        for batch in batches:
            reference = sweep.start(flat_inputs(graph, batch))
            signal += float(reference.double().square().sum())
            for group in state.groups:
                for precision, outputs in sweep.outputs(group):
                    error = (outputs - reference).double().square().sum()
                    noise[group.name, str(precision)] += float(error)
    check_signal(signal)
    values = {
        group.name: {str(c): noise[group.name, str(c)] / signal for c in group.candidates}
        for group in state.groups
    }
    return Sensitivity(values, method="sqnr", fingerprint=state.fingerprint)


class _Sweep(fx.Interpreter):
    """Keeps every float value of one batch and re-runs what a group's change reaches."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph, garbage_collect_values=False)
        self._graph = graph
        self._samples = 0
        self._float: dict[fx.Node, object] = {}
        self._nodes = list(graph.graph.nodes)
        self._downstream = {
            group.name: self._reach(group) for group in require(graph, stage="calibrated").groups
        }

    def start(self, inputs: list[object]) -> Tensor:
        """Run the float graph on a batch and keep every value; returns flat outputs."""
        self._samples = batch_size(inputs)
        outputs = self.run(*inputs, enable_io_processing=False)
        self._float = dict(self.env)
        return flatten_outputs(outputs, self._samples)

    def outputs(self, group: Group) -> Iterator[tuple[Precision, Tensor]]:
        """Yield each candidate of a group and the flat outputs with only that switched on."""
        for precision in group.candidates:
            switch_group(self._graph, group, precision)
            yield precision, flatten_outputs(self._rerun(group), self._samples)
        switch_group(self._graph, group, Precision())

    def _reach(self, group: Group) -> list[fx.Node]:
        """Nodes that depend on one of the group's quantizers, in graph order."""
        own = set(group.activation_quantizers)
        for layer in group.layers:
            own |= {name for name in (layer.weight_quantizer, layer.bias_correction) if name}
        reached: set[fx.Node] = set()
        for node in self._nodes:
            is_own = node.op == "call_module" and node.target in own
            if is_own or any(source in reached for source in node.all_input_nodes):
                reached.add(node)
        return [node for node in self._nodes if node in reached]

    def _rerun(self, group: Group) -> object:
        """Run the nodes downstream of a group, on top of the float values."""
        nodes = self._downstream[group.name]
        last_use = {source: node for node in nodes for source in node.all_input_nodes}
        self.env = dict(self._float)
        result: object = self._float[self._nodes[-1]]
        for node in nodes:
            result = self.run_node(node)
            self.env[node] = result
            for source in node.all_input_nodes:
                if last_use[source] is node and source in self.env:
                    del self.env[source]
        return result
