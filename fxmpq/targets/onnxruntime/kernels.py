"""Reading back which kernels ONNX Runtime chose."""

from __future__ import annotations

import onnx

from fxmpq.formats import Precision
from fxmpq.graph.state import Layer
from fxmpq.targets.outcome import KernelRule


def kernel_rule(executed: onnx.ModelProto) -> KernelRule:
    """Make the rule that tells each layer's kernel from the optimized graph.

    A layer is found by its weight scales, which every integer kernel reads.

    Args:
        executed: The graph the runtime optimized, which is what it executes.

    Returns:
        From a layer to its kernel, and why it is not an integer kernel where it is not.
    """
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in executed.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)

    def rule(layer: Layer, precision: Precision) -> tuple[str, str]:
        kernels: list[str] = []
        reason = ""
        for node in readers.get(f"scale_{layer.weight.replace('.', '_')}", []):
            if node.op_type == "DequantizeLinear":
                reason = "the runtime has no integer kernel for it and dequantizes its weights"
                kernels += [f"float {user.op_type}" for user in readers.get(node.output[0], [])]
            else:
                kernels.append(node.op_type)
        if not kernels:
            return "unknown", "the graph that the runtime executes does not show it"
        return ", ".join(dict.fromkeys(kernels)), reason

    return rule
