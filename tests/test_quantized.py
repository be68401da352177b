from __future__ import annotations

from torch import Tensor, nn

import fxmpq
from fxmpq.pipeline import quantize
from fxmpq.quantized import finish_plan

CANDIDATES = ["w2a8", "w4a8", "w8a8"]


def test_plans_again_without_measuring(conv_net: nn.Module, images: list[Tensor]) -> None:
    wide = quantize(
        conv_net, images, target="reference", budget="weights=30%", candidates=CANDIDATES
    )
    narrow = wide.solve("weights=12%")
    assert narrow.sensitivity is wide.sensitivity
    assert narrow.plan.costs["weights"] < wide.plan.costs["weights"]
    assert narrow.plan.loss is not None
    assert wide.plan.loss is not None
    assert narrow.plan.loss >= wide.plan.loss
    assert narrow.plan.layers.keys() == wide.plan.layers.keys()


def test_finish_plan_names_target_and_layers(conv_net: nn.Module, images: list[Tensor]) -> None:
    prepared = fxmpq.prepare(fxmpq.trace(conv_net, images[0]), "reference")
    choices = fxmpq.cost(prepared).uniform("w4a8")
    plan = finish_plan(prepared, fxmpq.Plan(choices))
    assert plan.target == "reference"
    assert plan.layers == dict.fromkeys(["stem.0", "conv1", "downsample.0", "conv2", "fc"], "w4a8")
