from __future__ import annotations

import torch
from torch import Tensor, fx

from fxmpq.graph.run import run_batch
from fxmpq.targets.layer_outputs import LayerOutputs


def test_layers_are_told_in_the_order_they_run(
    conv_graph: fx.GraphModule, images: list[Tensor]
) -> None:
    outputs = LayerOutputs(conv_graph, {"linear": "fc", "conv2d": "stem.0", "other": "none"})
    found = outputs.collect(images[0])
    assert [(value.layer, value.node) for value in found] == [
        ("stem.0", "conv2d"),
        ("fc", "linear"),
    ]
    (logits,) = run_batch(conv_graph, images[0])
    assert isinstance(logits, Tensor)
    assert torch.equal(found[-1].value, logits)


def test_every_batch_is_told_by_itself(conv_graph: fx.GraphModule, images: list[Tensor]) -> None:
    outputs = LayerOutputs(conv_graph, {"linear": "fc"})
    first, second = outputs.collect(images[0]), outputs.collect(images[1][:2])
    assert [entry.value.shape for entry in (*first, *second)] == [(6, 5), (2, 5)]
