"""What a layer's weight and bias become at each weight format, as changes against float."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from fxmpq.graph.attributes import get_tensor
from fxmpq.graph.state import Layer
from fxmpq.quantizers.modules import BiasCorrection, WeightQuantizer


@dataclass(frozen=True)
class WeightChanges:
    """Changes of one layer.

    Args:
        bits: Widths of the weight formats.
        weights: Rounded minus float weight, `[formats, *weight]`.
        shifts: Bias corrections, `[formats, channels]`; `None` if the layer has none.
    """

    bits: tuple[int, ...]
    weights: Tensor
    shifts: Tensor | None


def weight_changes(graph: fx.GraphModule, layer: Layer) -> WeightChanges:
    """Form a layer's changes for every calibrated weight format.

    Args:
        graph: A calibrated graph.
        layer: One with a weight quantizer.

    Returns:
        `Q_b(W) - W` per format, and the bias shifts that go with them.
    """
    assert layer.weight_quantizer is not None
    quantizer = graph.get_submodule(layer.weight_quantizer)
    assert isinstance(quantizer, WeightQuantizer)
    weight = get_tensor(graph, layer.weight).detach()
    with torch.no_grad():
        changes = [quantizer.quantize(weight, f) - weight for f in quantizer.formats]
    bits = tuple(number_format.bits for number_format in quantizer.formats)
    return WeightChanges(bits, torch.stack(changes), _shifts(graph, layer, quantizer))


def _shifts(graph: fx.GraphModule, layer: Layer, quantizer: WeightQuantizer) -> Tensor | None:
    if layer.bias_correction is None:
        return None
    correction = graph.get_submodule(layer.bias_correction)
    assert isinstance(correction, BiasCorrection)
    found = [correction.shift(number_format) for number_format in quantizer.formats]
    kept = [shift for shift in found if shift is not None]
    return torch.stack(kept) if kept and len(kept) == len(found) else None
