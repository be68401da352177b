from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from fxmpq.costs.table import CostTable
from fxmpq.costs.terms import Edge
from fxmpq.errors import BudgetError, CalibrationError, FxmpqError, InfeasibleBudgetError
from fxmpq.pipeline import quantize
from fxmpq.refinement.methods import METHODS as REFINEMENTS
from fxmpq.refinement.methods import Method

CANDIDATES = ["w2a8", "w4a8", "w8a8"]


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


def test_a_method_that_trains_is_refused_where_there_are_no_labels(
    conv_net: nn.Module, images: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(REFINEMENTS, "school", Method(lambda *_, **__: [], trains=True))
    with pytest.raises(FxmpqError, match=r"'school' trains with labels; .*fxmpq.refine\("):
        quantize(conv_net, images, target="reference", budget="weights=20%", refine="school")


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


def test_a_shape_that_is_no_tie_is_found_before_the_model_is_traced(
    conv_net: nn.Module, images: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    def started(*args: object) -> None:
        raise AssertionError("the model was traced")

    monkeypatch.setattr("fxmpq.pipeline.trace", started)
    with pytest.raises(FxmpqError, match=r"ties is a list of ties, as \['\*'\]"):
        quantize(conv_net, images, target="reference", budget="weights=20%", ties="*")


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
