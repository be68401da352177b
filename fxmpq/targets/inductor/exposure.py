"""Reading what a compiled graph computes inside: the activations that it quantizes."""

from __future__ import annotations

from torch import fx

from fxmpq.graph.batches import Batch, flat_inputs
from fxmpq.targets.inductor.compiled import CompiledGraph
from fxmpq.targets.inductor.program import dequantized, inductor_program
from fxmpq.targets.qdq import computed_by
from fxmpq.targets.target import LayerValue


class ExposedGraph:
    """A planned graph compiled so that it also returns its quantized activations.

    Codes are what layers hand on, so a layer is looked at where what it computed was rounded.
    The kernels are those of the model, but for sums: a convolution adds to codes in their
    place, which it cannot where these are returned.

    Args:
        graph: The planned graph.
        is_bfloat16: Whether float layers and products are computed in bfloat16.
    """

    def __init__(self, graph: fx.GraphModule, *, is_bfloat16: bool = False) -> None:
        self._graph = graph
        self._layers = computed_by(graph)
        program = inductor_program(graph, is_bfloat16=is_bfloat16)
        self._makers = [program.quantizers[name] for name in self._layers]
        (output,) = program.graph.graph.find_nodes(op="output")
        (returned,) = output.args
        output.args = ([returned, *self._makers],)
        program.graph.recompile()
        self._compiled = CompiledGraph(program)

    def __call__(self, batch: Batch) -> list[LayerValue]:
        """Run a batch; returns the quantized results of layers, in graph order, and the outputs."""
        returned = self._compiled(flat_inputs(self._graph, batch))
        count = len(returned) - len(self._makers)
        shown = [
            LayerValue(layer, quantizer, dequantized(value, maker))
            for (quantizer, layer), value, maker in zip(
                self._layers.items(), returned[count:], self._makers, strict=True
            )
        ]
        return [*shown, *(LayerValue("", "", value) for value in returned[:count])]
