from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

import fxmpq
from fxmpq.graph.rules import TargetRules
from fxmpq.graph.state import state_of
from fxmpq.pipeline import quantize, refine_folder
from fxmpq.quantizers.modules import ActivationQuantizer, WeightQuantizer
from fxmpq.quantizers.ranges import ActivationRange
from fxmpq.refinement.units import Units
from fxmpq.targets.registry import get_target
from fxmpq.targets.target import Converted

CANDIDATES = ["w2a8", "w4a8", "w8a8"]


def test_walks_the_whole_way(conv_net: nn.Module, images: list[Tensor], tmp_path: Path) -> None:
    before = {name: tensor.clone() for name, tensor in conv_net.state_dict().items()}
    result = quantize(
        conv_net, images, target="reference", budget="weights=20%", candidates=CANDIDATES
    )
    assert result.plan.relative["weights"] <= 0.20
    assert result.plan.gap == 0
    assert result.plan.target == "reference"
    assert result.plan.layers["downsample.0"] == result.plan.choices["conv1"]
    assert set(result.seconds) == {"trace", "calibrate", "measure", "solve"}
    assert torch.equal(result.calibrated(images[0]), fxmpq.trace(conv_net, images[0])(images[0]))
    converted = result.convert(tmp_path)
    assert torch.equal(converted.run(images[1])[0], result.graph(images[1]))
    for name, tensor in conv_net.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_blocks_and_floats_walk_the_whole_way(
    conv_net: nn.Module, images: list[Tensor], tmp_path: Path
) -> None:
    candidates = ["w4b32a8", "we2m1b16a8", "we4m3ae4m3", "w8a8"]
    result = quantize(
        conv_net, images, target="reference", budget="weights=20%", candidates=candidates
    )
    assert result.plan.relative["weights"] <= 0.20
    assert len(set(result.plan.choices.values())) > 1
    again = fxmpq.Plan.from_json(result.plan.to_json())
    assert again.choices == result.plan.choices
    converted = result.convert(tmp_path / "model")
    assert torch.equal(converted.run(images[1])[0], result.graph(images[1]))


def test_is_reproducible(conv_net: nn.Module, images: list[Tensor]) -> None:
    one, two = (
        quantize(conv_net, images, target="reference", budget="weights=20%", seed=7)
        for _ in range(2)
    )
    assert one.sensitivity.values == two.sensitivity.values
    assert one.plan.choices == two.plan.choices
    assert torch.equal(one.graph(images[0]), two.graph(images[0]))


def test_transformers_models_as_they_are(
    bert: nn.Module, token_batches: list[dict[str, Tensor]], resnet: nn.Module, resnet_batches: list
) -> None:
    for model, batches in ((bert, token_batches), (resnet, resnet_batches)):
        result = quantize(model, batches, target="onnxruntime", budget="weights=40%")
        output = result.graph(**batches[1])
        assert type(output) is type(model(**batches[1]))
        converted = result.convert()
        assert converted.sqnr_db > 25
        assert converted.run(batches[1])[0].shape == output.logits.shape


def even(graph: fx.GraphModule) -> bool:
    """Whether every active code is an even one, as `coarse` leaves them."""
    stored = [
        module.stored_codes(module.active)
        for module in graph.modules()
        if isinstance(module, WeightQuantizer) and module.active is not None
    ]
    return bool(stored) and all(codes is not None and not (codes % 2).any() for codes in stored)


def test_refines_the_plans_graph_and_every_later_one(
    conv_net: nn.Module, images: list[Tensor], coarse_refinement: list[str]
) -> None:
    plain = quantize(conv_net, images, target="reference", budget="weights=20%", progress=False)
    assert (plain.refinement, plain.calibration, coarse_refinement) == (None, (), [])
    result = quantize(
        conv_net, images, target="reference", budget="weights=20%", refine="coarse", progress=False
    )
    assert result.plan.choices == plain.plan.choices
    assert list(result.seconds) == ["trace", "calibrate", "measure", "solve", "refine"]
    assert even(result.graph)
    assert not even(result.calibrated)
    assert len(coarse_refinement) == 5
    expected = fxmpq.refine(result.calibrated, result.plan, images, method="coarse", progress=False)
    assert torch.equal(result.graph(images[0]), expected(images[0]))
    assert torch.equal(result.convert().run(images[0])[0], result.graph(images[0]))

    coarse_refinement.clear()
    narrow = result.solve("weights=12%")
    assert even(narrow.graph)
    assert (narrow.refinement, len(coarse_refinement)) == ("coarse", 5)
    assert torch.equal(result.simulate(narrow.plan)(images[0]), narrow.graph(images[0]))
    assert not even(plain.solve("weights=12%").graph)


def test_an_interrupted_refinement_goes_on(
    conv_net: nn.Module,
    images: list[Tensor],
    coarse_refinement: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    journal = tmp_path / "search.journal"
    request = {"target": "reference", "budget": "weights=20%", "progress": False}
    original = Units.unit

    def unit(self: Units, *args: object) -> list[float]:
        if len(coarse_refinement) == 3:
            raise KeyboardInterrupt
        return original(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Units, "unit", unit)
        with pytest.raises(KeyboardInterrupt):
            quantize(conv_net, images, **request, refine="coarse", resume=journal)
    assert len(list(refine_folder(journal).glob("*.safetensors"))) == 3
    result = quantize(conv_net, images, **request, refine="coarse", resume=journal)
    assert len(coarse_refinement) == 5
    whole = quantize(conv_net, images, **request, refine="coarse")
    assert torch.equal(result.graph(images[0]), whole.graph(images[0]))


def test_ranges_and_scales_are_found_by_the_rules_asked_for(
    conv_net: nn.Module, images: list[Tensor]
) -> None:
    result = quantize(
        conv_net,
        images,
        target="reference",
        budget="weights=20%",
        ranges={"rule": "percentile", "percentile": 99},
        weight_scales="minmax",
        progress=False,
    )
    expected = fxmpq.calibrate(
        fxmpq.prepare(fxmpq.trace(conv_net, images[0]), "reference"),
        images,
        ranges="percentile",
        percentile=99,
        weight_scales="minmax",
        progress=False,
    )
    assert state_of(result.calibrated).calibration == state_of(expected).calibration
    found, tensors = result.calibrated.state_dict(), expected.state_dict()
    assert all(found[name].equal(tensors[name]) for name in tensors)


def test_tied_layers_get_one_precision(conv_net: nn.Module, images: list[Tensor]) -> None:
    request = {"target": "onnxruntime", "budget": "weights=14%", "progress": False}
    free = quantize(conv_net, images, **request).plan  # type: ignore[arg-type]
    tied = quantize(conv_net, images, ties=["*conv*"], **request).plan  # type: ignore[arg-type]
    assert len(set(free.layers.values())) > 1
    assert tied.layers["conv1"] == tied.layers["conv2"] == tied.layers["downsample.0"]
    assert "conv2" not in tied.choices


def test_a_target_of_ones_own_walks_the_whole_way(
    conv_net: nn.Module, images: list[Tensor], chip_rules: TargetRules
) -> None:
    chip = replace(get_target("reference"), rules=chip_rules)
    result = quantize(conv_net, images, target=chip, budget="weights=20%", progress=False)
    state = state_of(result.graph)
    assert set(result.plan.choices) == {"stem.0", "conv1", "fc"}
    ((one, other),) = state.shared_ranges
    assert ranges_of(result.graph, one) == ranges_of(result.graph, other)


def test_a_budget_that_names_latency_has_it_measured(
    conv_net: nn.Module, images: list[Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FXMPQ_CACHE", str(tmp_path))

    def convert(graph: fx.GraphModule, output: Path | None) -> Converted:
        return Converted("quick", lambda batch: [], graph, (), ())

    quick = replace(get_target("reference"), convert=convert, latency=("torch",))
    found = quantize(
        conv_net,
        images,
        target=quick,
        budget="latency=1000,weights=20%",
        candidates=["w2a8", "w4a8"],
        progress=False,
    )
    assert 0 <= found.plan.costs["latency"] < 1000
    assert found.costs.float_total["latency"] > 0
    # Kept on disk, so that another search measures nothing.
    again = replace(quick, convert=get_target("reference").convert)
    before = set((tmp_path / "latency").iterdir())
    smallest = quantize(
        conv_net,
        images,
        target=again,
        budget="minimize=latency,sqnr=1",
        candidates=["w2a8", "w4a8"],
        progress=False,
    )
    assert set((tmp_path / "latency").iterdir()) == before
    assert smallest.costs.costs["latency"] == found.costs.costs["latency"]


def ranges_of(graph: fx.GraphModule, name: str) -> dict[str, ActivationRange]:
    quantizer = graph.get_submodule(name)
    assert isinstance(quantizer, ActivationQuantizer)
    return quantizer.ranges
