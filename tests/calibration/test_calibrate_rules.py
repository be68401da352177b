from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx

from fxmpq.calibration.calibrate import calibrate
from fxmpq.calibration.observe import Observations
from fxmpq.calibration.recalibrate import recalibrate
from fxmpq.errors import FxmpqError
from fxmpq.formats import NumberFormat, Precision
from fxmpq.graph.attributes import get_tensor
from fxmpq.graph.prepare import insert_quantizers
from fxmpq.graph.run import run_batch
from fxmpq.graph.state import require, state_of
from fxmpq.graph.switch import with_choices
from fxmpq.quantizers.modules import ActivationQuantizer, WeightQuantizer
from fxmpq.quantizers.planned import PlannedQuantizer
from fxmpq.quantizers.ranges import RANGES
from fxmpq.quantizers.weight_scale import minmax_weight_scales, mse_weight_scales
from fxmpq.storage.load import load
from fxmpq.storage.save import save
from fxmpq.targets.reference import REFERENCE
from fxmpq.training.freeze import freeze
from fxmpq.training.planned import trainable_plan


@pytest.mark.parametrize("rule", RANGES)
def test_every_rule_of_ranges_reaches_every_quantizer(
    conv_graph: fx.GraphModule, images: list[Tensor], rule: str
) -> None:
    """From one pass over the data: each batch is seen once."""
    prepared = insert_quantizers(
        conv_graph, REFERENCE.rules, candidates=[Precision(4, 4), Precision(8, 8)]
    )
    seen = Observations(prepared)
    with torch.no_grad():
        seen.observe(images)
    graph = calibrate(prepared, images, ranges=rule, progress=False)
    assert seen.histograms
    for name, histogram in seen.histograms.items():
        quantizer = graph.get_submodule(name)
        assert isinstance(quantizer, ActivationQuantizer)
        expected = {f.name: RANGES[rule].find(histogram, f) for f in quantizer.formats}
        assert quantizer.ranges == expected
    calibration = state_of(graph).calibration
    assert calibration is not None
    assert (calibration.ranges.rule, calibration.weight_scales.rule) == (rule, "mse")


@pytest.mark.parametrize("rule", RANGES)
def test_what_a_kind_reads_in_signed_codes_has_its_zero_in_the_middle(
    conv_graph: fx.GraphModule, images: list[Tensor], rule: str, tmp_path: Path
) -> None:
    """Through a file and a second calibration too; refined ranges keep it."""
    rules = replace(REFERENCE.rules, symmetric_inputs_of=frozenset({"conv"}))
    candidates = [Precision(4, 4), Precision(8, 8)]
    graph = insert_quantizers(conv_graph, rules, candidates=candidates)
    graph = calibrate(graph, images, ranges=rule, progress=False)
    save(graph, tmp_path)
    again = recalibrate(load(tmp_path), images)
    group = state_of(graph).group("fc")
    for found in (graph, again):
        for name, quantizer in found.named_modules():
            if isinstance(quantizer, ActivationQuantizer):
                zero_points = {key: entry.zero_point for key, entry in quantizer.ranges.items()}
                is_linear = name in group.activation_quantizers
                assert (zero_points == {"uint4": 8, "uint8": 128}) is not is_linear


def test_learned_scales_leave_a_symmetric_range_symmetric(
    conv_graph: fx.GraphModule, images: list[Tensor]
) -> None:
    rules = replace(REFERENCE.rules, symmetric_inputs_of=frozenset({"conv"}))
    graph = insert_quantizers(conv_graph, rules, candidates=[Precision(8, 8)])
    graph = calibrate(graph, images, progress=False)
    planned = with_choices(graph, {group.name: "w8a8" for group in state_of(graph).groups})
    trained = trainable_plan(planned)
    moved = [
        module
        for name, module in trained.named_modules()
        if isinstance(module, PlannedQuantizer) and "activation" in name
    ]
    with torch.no_grad():
        for module in moved:
            for parameter in module.parameters():
                parameter.mul_(1.5)
    freeze(trained, planned)
    ranges = [
        module.ranges["uint8"]
        for module in planned.modules()
        if isinstance(module, ActivationQuantizer) and module.is_symmetric
    ]
    assert len(ranges) == 3
    assert {found.zero_point for found in ranges} == {128}


def test_the_data_is_passed_once(conv_graph: fx.GraphModule, images: list[Tensor]) -> None:
    passes: list[int] = []

    class Counted(list):
        def __iter__(self) -> Iterator[Tensor]:
            passes.append(1)
            return super().__iter__()

    prepared = insert_quantizers(conv_graph, REFERENCE.rules)
    calibrate(prepared, Counted(images), ranges="percentile", percentile=99, progress=False)
    assert len(passes) == 1


def test_weight_scales_follow_their_rule(conv_graph: fx.GraphModule, images: list[Tensor]) -> None:
    prepared = insert_quantizers(conv_graph, REFERENCE.rules, candidates=[Precision(3)])
    found = []
    for scales in ("minmax", {"rule": "mse", "p": 4}):
        graph = calibrate(prepared, images, weight_scales=scales, progress=False)
        layer = require(graph, stage="calibrated").groups[0].layers[0]
        quantizer = graph.get_submodule(str(layer.weight_quantizer))
        assert isinstance(quantizer, WeightQuantizer)
        found.append(quantizer.scale(NumberFormat(3)))
    weight = get_tensor(graph, layer.weight)
    (smallest,) = minmax_weight_scales(weight, [NumberFormat(3)], 0)
    (tuned,) = mse_weight_scales(weight, [NumberFormat(3)], 0, p=4)
    assert found[0].equal(smallest)
    assert found[1].equal(tuned)
    assert not found[0].equal(found[1])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ranges": "precentile"}, "no rule 'precentile' for ranges; there are 'percentile'"),
        ({"ranges": "percentile", "percentile": 50}, "greater than 50 and at most 100; found 50"),
        ({"ranges": "kl", "k": 3}, "the rule 'kl' for ranges has no option 'k'; it takes none"),
        ({"p": 0}, "mse's p must be a number greater than 0; found 0"),
        ({"weight_scales": "kl"}, "no rule 'kl' for weight_scales; there are 'minmax', 'mse'"),
        ({"weight_scales": {"rule": "mse", "p": -1}}, "weight_scales: mse's p must be"),
    ],
)
def test_mistakes_are_found_before_the_data_is_read(
    conv_graph: fx.GraphModule, options: dict[str, object], words: str
) -> None:
    prepared = insert_quantizers(conv_graph, REFERENCE.rules)

    def unread() -> Iterator[Tensor]:
        raise AssertionError("the data was read")
        yield

    with pytest.raises(FxmpqError, match=words):
        calibrate(prepared, unread(), progress=False, **options)


def test_calibrating_again_starts_from_nothing(
    conv_graph: fx.GraphModule, images: list[Tensor]
) -> None:
    """A planned graph is observed in float, and corrections that are not wanted are gone."""
    prepared = insert_quantizers(conv_graph, REFERENCE.rules, candidates=[Precision(2, 4)])
    first = calibrate(prepared, images, progress=False)
    names = [group.name for group in require(first, stage="calibrated").groups]
    planned = with_choices(first, dict.fromkeys(names, "w2a4"))
    again = calibrate(planned, images, bias_correction=False, progress=False)
    expected = calibrate(prepared, images, bias_correction=False, progress=False)
    assert state_of(again) == state_of(expected)
    tensors, others = again.state_dict(), expected.state_dict()
    assert set(tensors) == set(others)
    assert all(tensors[name].equal(others[name]) for name in tensors)
    assert torch.equal(run_batch(again, images[0])[0], run_batch(prepared, images[0])[0])
