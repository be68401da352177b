"""How the layers of a file are written, for the convert report."""

from __future__ import annotations

import onnx
from torch import fx

from fxmpq.formats import NumberFormat, Precision
from fxmpq.granularity import PerBlock
from fxmpq.graph.state import Layer, Member
from fxmpq.targets.onnxruntime.layer_nodes import WrittenModel, layer_nodes

_NOT_RUN = "written for TensorRT, not run on it"


class DescribedLayers:
    """Tells how each quantized layer or product is written.

    Args:
        graph: The planned graph.
        written: The model as it is written.
    """

    def __init__(self, graph: fx.GraphModule, written: WrittenModel) -> None:
        self._nodes = layer_nodes(written, graph)
        self._dequantized = written.made_by("DequantizeLinear")

    def __call__(self, member: Member, precision: Precision) -> tuple[str, str]:
        """What stands in the file for a layer or product, and why it is not what was asked."""
        operands = [precision.activation, precision.weight]
        if not isinstance(member, Layer):
            operands = [precision.activation, precision.activation]
        text = f"{member.kind} of {' and '.join(map(_described, operands))}: {_NOT_RUN}"
        return text, self._problem(member, precision)

    def _problem(self, member: Member, precision: Precision) -> str:
        if not isinstance(member, Layer):
            return ""
        node = self._nodes.get(member.name)
        if node is None:
            return "it is not found in the file as one operator"
        wanted = [precision.activation, precision.weight]
        missing = [
            what
            for position, (what, found) in enumerate(zip(("input", "weight"), wanted, strict=True))
            if found is not None and not self._reads_codes(node, position)
        ]
        return f"its {' and '.join(missing)} is not dequantized right before it" if missing else ""

    def _reads_codes(self, node: onnx.NodeProto, position: int) -> bool:
        return position < len(node.input) and node.input[position] in self._dequantized


def _described(found: NumberFormat | None) -> str:
    """A format for people, as `int8` or `int4 in blocks of 64`."""
    if found is None:
        return "float"
    name = f"int{found.bits}" if found.is_integer else found.scheme.value
    if isinstance(found.granularity, PerBlock):
        return f"{name} in blocks of {found.granularity.size}"
    return name
