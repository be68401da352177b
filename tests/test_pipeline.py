from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

import fxmpq
from fxmpq.errors import BudgetError, CalibrationError, FxmpqError, InfeasibleBudgetError
from fxmpq.pipeline import finish_plan, quantize

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


def test_is_reproducible(conv_net: nn.Module, images: list[Tensor]) -> None:
    one, two = (
        quantize(conv_net, images, target="reference", budget="weights=20%", seed=7)
        for _ in range(2)
    )
    assert one.sensitivity.values == two.sensitivity.values
    assert one.plan.choices == two.plan.choices
    assert torch.equal(one.graph(images[0]), two.graph(images[0]))


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
        ({"calibration": []}, CalibrationError, "empty"),
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


def test_finish_plan_names_target_and_layers(conv_net: nn.Module, images: list[Tensor]) -> None:
    prepared = fxmpq.prepare(fxmpq.trace(conv_net, images[0]), "reference")
    choices = fxmpq.cost(prepared).uniform("w4a8")
    plan = finish_plan(prepared, fxmpq.Plan(choices))
    assert plan.target == "reference"
    assert plan.layers == dict.fromkeys(["stem.0", "conv1", "downsample.0", "conv2", "fc"], "w4a8")


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
