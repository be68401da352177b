"""Reading what the runtime computes inside a model: the activations that it quantizes."""

from __future__ import annotations

from collections.abc import Mapping

import openvino as ov
from openvino import opset13
from torch import fx

from fxmpq.graph.batches import Batch, flat_inputs
from fxmpq.targets.openvino.compiled import OpenvinoModel
from fxmpq.targets.openvino.translate import quantization_name
from fxmpq.targets.qdq import active_quantizers, computed_by
from fxmpq.targets.target import LayerValue


class ExposedModel:
    """A converted model that also returns its quantized activations.

    Codes are what layers hand on, so a layer is looked at where what it computed was rounded: the
    kernels before and behind stay those of the model.

    Args:
        graph: The planned graph.
        model: The converted model; not changed.
        options: What it is compiled with.
        threads: Threads inside an operator.
    """

    def __init__(
        self, graph: fx.GraphModule, model: ov.Model, options: Mapping[str, str], threads: int
    ) -> None:
        self._graph = graph
        self._shown = computed_by(graph)
        exposed = model.clone()
        operations = {node.get_friendly_name(): node for node in exposed.get_ordered_ops()}
        self._outputs = len(exposed.outputs)
        indices = {name: index for index, name in enumerate(active_quantizers(graph))}
        for quantizer in self._shown:
            operation = operations[quantization_name(indices[quantizer])]
            # `add_outputs` adds none where the model already returns the value.
            exposed.add_results([opset13.result(operation.output(0))])
        self.loaded = OpenvinoModel(exposed, options, threads)

    def __call__(self, batch: Batch) -> list[LayerValue]:
        """Run a batch; returns the quantized results of layers, in graph order, and the outputs."""
        values = self.loaded(flat_inputs(self._graph, batch))
        outputs, values = values[: self._outputs], values[self._outputs :]
        return [
            *(
                LayerValue(layer, quantizer, value)
                for (quantizer, layer), value in zip(self._shown.items(), values, strict=True)
            ),
            *(LayerValue("", "", value) for value in outputs),
        ]
