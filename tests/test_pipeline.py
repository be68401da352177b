from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn
from torchmetrics.classification import MulticlassAccuracy

import fxmpq
from fxmpq.costs.table import CostTable
from fxmpq.costs.terms import Edge
from fxmpq.errors import BudgetError, CalibrationError, FxmpqError, InfeasibleBudgetError
from fxmpq.graph.rules import TargetRules
from fxmpq.graph.state import state_of
from fxmpq.pipeline import quantize, refine_folder
from fxmpq.quantizers.modules import ActivationQuantizer, WeightQuantizer
from fxmpq.quantizers.ranges import ActivationRange
from fxmpq.refinement.methods import METHODS as REFINEMENTS
from fxmpq.refinement.methods import Method
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


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"target": "tpu"}, FxmpqError, "no target 'tpu'"),
        ({"budget": "wights=15%"}, BudgetError, "'weights'"),
        ({"budget": "weights=1%"}, InfeasibleBudgetError, "smallest value reachable"),
        ({"method": "sqrn"}, FxmpqError, "'sqnr'"),
        ({"probe": 4}, FxmpqError, "'probes'"),
        ({"candidates": ["w1a8"]}, FxmpqError, "1-bit"),
        ({"candidates": ["w4b0a8"]}, FxmpqError, "a block of 0 values"),
        (
            {"target": "onnxruntime", "candidates": ["w8a8", "w4b32a8"]},
            FxmpqError,
            "'onnxruntime' cannot run w4b32a8.*scales per channel",
        ),
        ({"target": "onnxruntime", "candidates": ["we4m3ae4m3"]}, FxmpqError, "cannot run we4m3"),
        ({"ties": [("fc", "conv[0-9]", "fcc")]}, FxmpqError, "no layer matches 'fcc'"),
        ({"calibration": []}, CalibrationError, "empty"),
        ({"refine": "lihgt"}, FxmpqError, "no refinement 'lihgt'"),
        ({"budget": "latency=60%"}, FxmpqError, "latency cannot be measured for target 'refer"),
    ],
)
def test_unusable_requests_fail_before_calibration(
    conv_net: nn.Module,
    images: list[Tensor],
    monkeypatch: pytest.MonkeyPatch,
    options: dict,
    error: type[FxmpqError],
    message: str,
) -> None:
    def started(*args: object, **kwargs: object) -> None:
        raise AssertionError("long work started")

    monkeypatch.setattr("fxmpq.pipeline.calibrate", started)
    request = {"calibration": images, "target": "reference", "budget": "weights=20%", **options}
    with pytest.raises(error, match=message):
        quantize(conv_net, request.pop("calibration"), **request)


def broken(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    inputs, labels = batch
    return nn.functional.cross_entropy(model(inputs), labels)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labelled": [1]}, "labelled= is what a loss or a metric takes, and the method 'proj"),
        ({"method": "sqnr", "score": "kl", "labelled": [1]}, "labelled= is what a loss"),
        ({"method": "sqnr", "score": "kull"}, "no score 'kull'"),
        ({"method": "sqnr", "score": MulticlassAccuracy(5)}, "needs targets: give labelled="),
        ({"method": "hessian", "loss": broken}, "the loss failed on .* as labelled= is not given"),
        ({"method": "sqnr", "score": broken}, "the loss failed on .* as labelled= is not given"),
        ({"method": "finetune", "loss": "training_step"}, r"a loss is a callable .*found str"),
        (
            {"method": "learned_scales", "loss": broken, "labelled": [[1, 2, 3]]},
            "the loss failed on the first of the labelled batches: ValueError",
        ),
        (
            {"method": "layer_loss", "score": lambda model, batch: batch, "labelled": [[1]]},
            r"^loss\(model, batch\) must return a scalar",
        ),
        (
            {"method": "layer_loss", "score": lambda model, batch: torch.tensor(torch.nan)},
            "the score of the unchanged model is nan",
        ),
    ],
)
def test_losses_and_labels_that_do_not_fit_fail_before_calibration(
    conv_net: nn.Module,
    images: list[Tensor],
    monkeypatch: pytest.MonkeyPatch,
    options: dict,
    message: str,
) -> None:
    def started(*args: object, **kwargs: object) -> None:
        raise AssertionError("long work started")

    monkeypatch.setattr("fxmpq.pipeline.calibrate", started)
    with pytest.raises(FxmpqError, match=message):
        quantize(conv_net, images, target="reference", budget="weights=20%", **options)


def test_a_loss_reads_its_own_batches(conv_net: nn.Module, images: list[Tensor]) -> None:
    """The calibration data has no labels; the loss's batches are tried once, then measured."""
    labelled = [(x, x.flatten(1).argmax(1) % 2) for x in images]
    for options in (
        {"method": "hessian", "loss": broken, "probes": 1},
        {"method": "sqnr", "score": broken},
        {"method": "sqnr", "score": MulticlassAccuracy(5)},
    ):
        result = quantize(
            conv_net,
            images,
            target="reference",
            budget="weights=20%",
            candidates=CANDIDATES,
            labelled=labelled,
            **options,
        )
        assert result.sensitivity.method == options["method"]
        assert result.plan.relative["weights"] <= 0.2


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


def test_a_method_that_trains_is_refused_where_there_are_no_labels(
    conv_net: nn.Module, images: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(REFINEMENTS, "school", Method(lambda *_, **__: [], trains=True))
    with pytest.raises(FxmpqError, match=r"'school' trains with labels; .*fxmpq.refine\("):
        quantize(conv_net, images, target="reference", budget="weights=20%", refine="school")


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


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ranges": "percntile"}, "no rule 'percntile' for ranges; there are 'percentile'"),
        ({"ranges": {"rule": "mse", "k": 3}}, "the rule 'mse' for ranges has no option 'k'"),
        ({"weight_scales": {"rule": "mse", "p": 0}}, "weight_scales: mse's p must be"),
    ],
)
def test_unknown_rules_are_found_before_the_model_is_traced(
    images: list[Tensor], options: dict[str, object], words: str
) -> None:
    with pytest.raises(FxmpqError, match=words):
        quantize(Untraced(), images, target="reference", budget="weights=20%", **options)


class Untraced(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise AssertionError("it was traced")


def test_tied_layers_get_one_precision(conv_net: nn.Module, images: list[Tensor]) -> None:
    request = {"target": "onnxruntime", "budget": "weights=14%", "progress": False}
    free = quantize(conv_net, images, **request).plan  # type: ignore[arg-type]
    tied = quantize(conv_net, images, ties=["*conv*"], **request).plan  # type: ignore[arg-type]
    assert len(set(free.layers.values())) > 1
    assert tied.layers["conv1"] == tied.layers["conv2"] == tied.layers["downsample.0"]
    assert "conv2" not in tied.choices


def test_a_shape_that_is_no_tie_is_found_before_the_model_is_traced(
    conv_net: nn.Module, images: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    def started(*args: object) -> None:
        raise AssertionError("the model was traced")

    monkeypatch.setattr("fxmpq.pipeline.trace", started)
    with pytest.raises(FxmpqError, match=r"ties is a list of ties, as \['\*'\]"):
        quantize(conv_net, images, target="reference", budget="weights=20%", ties="*")


def test_a_target_of_ones_own_walks_the_whole_way(
    conv_net: nn.Module, images: list[Tensor], chip_rules: TargetRules
) -> None:
    chip = replace(get_target("reference"), rules=chip_rules)
    result = quantize(conv_net, images, target=chip, budget="weights=20%", progress=False)
    state = state_of(result.graph)
    assert set(result.plan.choices) == {"stem.0", "conv1", "fc"}
    ((one, other),) = state.shared_ranges
    assert ranges_of(result.graph, one) == ranges_of(result.graph, other)


def test_a_program_that_counts_no_format_changes_is_refused_before_calibration(
    conv_net: nn.Module, images: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    def with_edges(*args: object, **options: object) -> CostTable:
        table = CostTable({"weights": {g: {"w4a8": 1, "w8a8": 2} for g in ("a", "b")}})
        change = {name: {"w4a8": 0, "w8a8": 1} for name in ("w4a8", "w8a8")}
        return replace(table, edges={"weights": [Edge("a", "b", change)]})

    def started(*args: object, **kwargs: object) -> None:
        raise AssertionError("long work started")

    monkeypatch.setattr("fxmpq.pipeline.cost", with_edges)
    monkeypatch.setattr("fxmpq.pipeline.calibrate", started)
    with pytest.raises(BudgetError, match="'weights' counts format changes.*'greedy' cannot"):
        quantize(conv_net, images, target="reference", budget="weights=9", program="greedy")
    with pytest.raises(AssertionError, match="long work started"):
        quantize(conv_net, images, target="reference", budget="weights=9", program="ilp")


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
