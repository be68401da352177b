"""Reading what the runtime computes inside a model, with the kernels that it uses anyway."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import onnx
from torch import fx

from fxmpq.graph.batches import Batch, flat_inputs
from fxmpq.graph.state import state_of
from fxmpq.targets.onnxruntime.layer_nodes import WrittenModel, layer_nodes, visible_value
from fxmpq.targets.onnxruntime.session import OnnxModel
from fxmpq.targets.target import LayerValue

_MOVES_DATA = frozenset({"Transpose", "ReorderInput", "ReorderOutput", "DequantizeLinear"})
"""Operators that more outputs may bring without changing what is computed."""


@dataclass(frozen=True)
class _Exposed:
    layer: str
    node: str
    value: str


class ExposedModel:
    """A converted model that also returns its layers' results.

    Results become further outputs of the model. That would keep the runtime from fusing what
    lies around some of them, and then other kernels would be looked at than those that run; so
    results are seen behind what fuses, and if the kernels still differ, half of the layers are
    shown at a time, then a quarter, until they do not.

    Args:
        graph: The planned graph.
        serialized: The converted model.
        plain: The same, loaded.
        threads: Threads inside an operator.
    """

    def __init__(
        self, graph: fx.GraphModule, serialized: bytes, plain: OnnxModel, threads: int
    ) -> None:
        self._graph = graph
        self._model = onnx.load_model_from_string(serialized)
        self._kernels = _kernels(plain)
        self._threads = threads
        self._parts = self._load(_visible(graph, self._model))

    def __call__(self, batch: Batch) -> list[LayerValue]:
        """Run a batch; returns the layers' results, of those that can be seen."""
        inputs = flat_inputs(self._graph, batch)
        found: list[LayerValue] = []
        for model, shown in self._parts:
            names = [entry.name for entry in model.session.get_outputs()]
            values = dict(zip(names, model(inputs), strict=True))
            found += [LayerValue(entry.layer, entry.node, values[entry.value]) for entry in shown]
        return found

    def _load(self, shown: list[_Exposed]) -> list[tuple[OnnxModel, list[_Exposed]]]:
        """Load models that show these results; a result that changes a kernel is left out."""
        if not shown:
            return []
        model = onnx.ModelProto()
        model.CopyFrom(self._model)
        names = dict.fromkeys(entry.value for entry in shown)
        for returned in self._model.graph.output:
            names.pop(returned.name, None)
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
        loaded = OnnxModel(model.SerializeToString(), self._threads)
        if _kernels(loaded) == self._kernels:
            return [(loaded, shown)]
        if len(shown) == 1:
            return []
        middle = len(shown) // 2
        return self._load(shown[:middle]) + self._load(shown[middle:])


def _visible(graph: fx.GraphModule, model: onnx.ModelProto) -> list[_Exposed]:
    """Where each layer's result can be seen."""
    written = WrittenModel(model)
    layers = {layer.name: layer for group in state_of(graph).groups for layer in group.layers}
    nodes = {node.name: node for node in graph.graph.nodes}
    found: list[_Exposed] = []
    for name, node in layer_nodes(written, graph).items():
        layer = layers[name]
        place = visible_value(written, node, graph, nodes[layer.node], layer)
        found.append(_Exposed(name, *place))
    return found


def _kernels(model: OnnxModel) -> Counter[tuple[str, str]]:
    """How often each kernel runs."""
    found = ((str(node.domain), str(node.op_type)) for node in model.executed.graph.node)
    return Counter(entry for entry in found if entry[1] not in _MOVES_DATA)
