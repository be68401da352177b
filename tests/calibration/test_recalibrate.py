from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

from fxmpq.calibration.calibrate import calibrate
from fxmpq.calibration.recalibrate import recalibrate
from fxmpq.errors import CalibrationError, FxmpqError
from fxmpq.formats import Precision
from fxmpq.graph.prepare import insert_quantizers
from fxmpq.graph.run import run_batch
from fxmpq.graph.state import copy_graph, state_of
from fxmpq.graph.switch import with_choices
from fxmpq.quantizers.modules import ActivationQuantizer, WeightQuantizer
from fxmpq.targets.reference import REFERENCE


@pytest.fixture(name="prepared", scope="module")
def prepared_fixture(conv_graph: fx.GraphModule) -> fx.GraphModule:
    return insert_quantizers(
        conv_graph, REFERENCE.rules, candidates=[Precision(3, 4), Precision(8, 8)]
    )


def ranges_of(graph: fx.GraphModule) -> list[object]:
    return [module.ranges for module in graph.modules() if isinstance(module, ActivationQuantizer)]


def same(one: fx.GraphModule, other: fx.GraphModule) -> bool:
    tensors, others = one.state_dict(), other.state_dict()
    return ranges_of(one) == ranges_of(other) and (
        set(tensors) == set(others) and all(tensors[k].equal(others[k]) for k in tensors)
    )


def planned(graph: fx.GraphModule) -> fx.GraphModule:
    names = [group.name for group in state_of(graph).groups]
    return with_choices(graph, {n: "w3a4" if i % 2 else "w8a8" for i, n in enumerate(names)})


@pytest.mark.parametrize("ranges", ["mse", {"rule": "percentile", "percentile": 98}])
@pytest.mark.parametrize("corrected", [True, False])
def test_the_same_data_gives_the_same_graph(
    prepared: fx.GraphModule, images: list[Tensor], ranges: object, corrected: bool
) -> None:
    """Also from a graph whose quantizers are switched on, which stays switched."""
    calibrated = calibrate(
        prepared,
        images,
        ranges=ranges,
        weight_scales="minmax",
        bias_correction=corrected,
        progress=False,
    )
    assert same(recalibrate(calibrated, images), calibrated)
    plan = planned(calibrated)
    again = recalibrate(plan, images)
    assert same(again, plan)
    assert state_of(again) == state_of(plan)
    assert torch.equal(run_batch(again, images[0])[0], run_batch(plan, images[0])[0])


def test_changed_weights_get_ranges_and_scales_of_their_own(
    prepared: fx.GraphModule, images: list[Tensor]
) -> None:
    calibrated = calibrate(prepared, images, ranges="sigma", k=3, progress=False)
    plan = planned(calibrated)
    changed = copy_graph(plan)
    changed.conv1.weight = nn.Parameter(changed.conv1.weight.detach() * 4)
    float_graph = copy_graph(prepared)
    float_graph.conv1.weight = changed.conv1.weight
    expected = calibrate(float_graph, images, ranges="sigma", k=3, progress=False)
    found = recalibrate(changed, images)
    assert same(found, planned(expected))
    assert not same(found, plan)


def test_stored_codes_and_the_record_of_refinement_are_gone(
    prepared: fx.GraphModule, images: list[Tensor]
) -> None:
    calibrated = calibrate(prepared, images, progress=False)
    refined = copy_graph(calibrated)
    quantizers = [m for m in refined.modules() if isinstance(m, WeightQuantizer)]
    for quantizer in quantizers:
        for number_format in quantizer.formats:
            shape = quantizer.scale(number_format).shape
            quantizer.set_codes(number_format, torch.zeros(shape))
    again = recalibrate(refined, images)
    for module in again.modules():
        if isinstance(module, WeightQuantizer):
            assert all(module.stored_codes(entry) is None for entry in module.formats)
    assert state_of(again).refinements == ()
    assert all(quantizer.stored_codes(quantizer.formats[0]) is not None for quantizer in quantizers)


def test_an_uncalibrated_graph_and_no_data_are_errors(
    prepared: fx.GraphModule, images: list[Tensor]
) -> None:
    with pytest.raises(FxmpqError, match="fxmpq.calibrate"):
        recalibrate(prepared, images)
    with pytest.raises(CalibrationError, match="empty"):
        recalibrate(calibrate(prepared, images, progress=False), [])
