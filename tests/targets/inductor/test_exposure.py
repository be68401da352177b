from __future__ import annotations

import torch
from torch import Tensor, fx

from fxmpq.graph.run import run_batch
from fxmpq.graph.state import require
from fxmpq.graph.switch import with_choices
from fxmpq.targets.divergence import layer_agreements
from fxmpq.targets.qdq import computed_by
from fxmpq.targets.target import Converted


def test_values_are_what_the_kernels_computed(
    made: Converted, planned: fx.GraphModule, images: list[Tensor]
) -> None:
    assert made.layer_values is not None
    *values, outputs = made.layer_values(images[0])
    assert (outputs.layer, outputs.node) == ("", "")
    assert torch.allclose(outputs.value, made.run(images[0])[0], atol=1e-2)
    assert [(entry.node, entry.layer) for entry in values] == list(computed_by(planned).items())
    assert [entry.layer for entry in values] == ["stem.0", "conv1", "conv2"]
    for entry in layer_agreements(planned, made, images[0]):
        assert entry.sqnr_db > 45


def test_the_layer_that_differs_is_found(
    made: Converted, ready: fx.GraphModule, planned: fx.GraphModule, images: list[Tensor]
) -> None:
    choices = dict(require(planned, stage="calibrated").choices)
    groups = require(planned, stage="calibrated").groups
    (group,) = [group.name for group in groups if "stem.0" in [x.name for x in group.layers]]
    other = with_choices(ready, {**choices, group: "w4a8"})
    agreements = layer_agreements(other, made, images[0])
    assert [entry.layer for entry in agreements if entry.sqnr_db < 35] == ["stem.0"]
    assert not torch.equal(run_batch(other, images[0])[0], run_batch(planned, images[0])[0])
