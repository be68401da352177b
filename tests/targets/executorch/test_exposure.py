from __future__ import annotations

import torch
from torch import Tensor, fx

from fxmpq.graph.run import run_batch
from fxmpq.targets.executorch import EXECUTORCH
from fxmpq.targets.executorch.exposure import return_activations
from fxmpq.targets.executorch.rewrite import to_xnnpack_form
from fxmpq.targets.qdq import active_quantizers

Samples = list[tuple[Tensor, Tensor]]


class Recorder(fx.Interpreter):
    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.values: dict[str, object] = {}

    def run_node(self, n: fx.Node) -> object:
        self.values[n.name] = super().run_node(n)
        return self.values[n.name]


def test_activations_follow_what_was_returned(net_plan: fx.GraphModule, samples: Samples) -> None:
    shown = to_xnnpack_form(net_plan, EXECUTORCH.rules)
    plain = to_xnnpack_form(net_plan, EXECUTORCH.rules)
    names = return_activations(shown, active_quantizers(net_plan))
    outputs = shown(*samples[0])
    assert len(outputs) == 2 + len(names)
    for one, other in zip(outputs, run_batch(net_plan, samples[0]), strict=False):
        assert torch.allclose(one, other, atol=1e-5)
    simulated = Recorder(net_plan)
    simulated.run(*samples[0])
    assert len(names) == len(set(names)) > 5
    for name, value in zip(names, outputs[2:], strict=True):
        assert torch.allclose(value, simulated.values[name], atol=1e-5)
    # The graph that it was made from returns what it did.
    assert len(plain(*samples[0])) == 2
