"""What rewritten layers read: stored codes, scales and biases."""

from __future__ import annotations

from torch import Tensor, fx

from fxmpq.graph.attributes import get_tensor
from fxmpq.graph.operators import OPERATORS, argument
from fxmpq.quantizers.codes import nearest_codes
from fxmpq.quantizers.integer import per_channel
from fxmpq.quantizers.modules import WeightQuantizer
from fxmpq.targets.lowering import store_tensor


def stored_weight(
    graph: fx.GraphModule,
    node: fx.Node,
    quantizer: WeightQuantizer,
    codes: Tensor,
    scale: Tensor,
    factor: int = 1,
) -> tuple[fx.Node, fx.Node]:
    """Nodes that read a weight's codes, multiplied by `factor`, and the scales that go with it."""
    assert quantizer.active is not None
    width = f"{quantizer.active.bits}bit" + ("" if factor == 1 else str(factor))
    stored = store_tensor(graph, f"codes_{width}_{quantizer.name}", codes * factor, node)
    return stored, store_tensor(graph, f"scale_{quantizer.name}", scale, node)


def weight_codes(
    graph: fx.GraphModule, quantizer: WeightQuantizer, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """A weight's codes and scales: its own, or the codes for another scale."""
    assert quantizer.active is not None
    weight = get_tensor(graph, quantizer.name).detach()
    if scale is None:
        return quantizer.codes(weight, quantizer.active), quantizer.scale(quantizer.active)
    # Rounding the quantized weight finds its own codes again wherever the scale is unchanged.
    rounded = quantizer.quantize(weight, quantizer.active)
    spread = per_channel(scale, weight.dim(), quantizer.axis)
    return nearest_codes(rounded, spread, quantizer.active), scale


def bias_of(graph: fx.GraphModule, node: fx.Node) -> Tensor | None:
    """A call's stored bias; `None` if it has none or computes it."""
    source = argument(node, OPERATORS[node.target].bias)
    if not isinstance(source, fx.Node) or source.op != "get_attr":
        return None
    return get_tensor(graph, str(source.target))
