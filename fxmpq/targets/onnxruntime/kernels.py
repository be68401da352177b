"""Reading back which kernels ONNX Runtime chose."""

from __future__ import annotations

import onnx
from torch import fx

from fxmpq.formats import Precision
from fxmpq.graph.state import Layer
from fxmpq.targets.outcome import KernelRule


def kernel_rule(rewritten: fx.GraphModule, executed: onnx.ModelProto) -> KernelRule:
    """Make the rule that tells each layer's kernel from the optimized graph.

    Args:
        rewritten: The graph that was exported.
        executed: The graph the runtime optimized, which is what it executes.

    Returns:
        From a layer to its kernel, and why it is not an integer kernel where it is not.
    """
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in executed.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)

    def rule(layer: Layer, precision: Precision) -> tuple[str, str]:
        flat = layer.weight.replace(".", "_")
        names = [f"scale_{flat}"]
        found = [node.op_type for name in names for node in readers.get(name, [])]
        return ", ".join(dict.fromkeys(found)) or "unknown", ""

    return rule
