from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn
from torchmetrics.classification import MulticlassAccuracy

from fxmpq.errors import BatchError, CalibrationError, FxmpqError
from fxmpq.graph.state import require
from fxmpq.graph.switch import with_choices
from fxmpq.sensitivity.measure import METHODS, check_method, measure, reads_labels
from fxmpq.sensitivity.projected import projected
from fxmpq.sensitivity.scores import SCORES
from fxmpq.sensitivity.sqnr import sqnr
from fxmpq.training.loss import StepLoss


@pytest.fixture(scope="module")
def graph(
    calibrated: Callable[..., fx.GraphModule], conv_graph: fx.GraphModule, images: list[Tensor]
) -> fx.GraphModule:
    return calibrated(conv_graph, images)


def test_methods_are_called_with_their_options(graph: fx.GraphModule, images: list[Tensor]) -> None:
    found = measure(graph, iter(images), probes=2, seed=5, progress=False)
    expected = projected(graph, images, probes=2, seed=5)
    assert found.method == "projected"
    assert np.array_equal(found.projections, expected.projections)
    swept = measure(graph, images, method="sqnr", progress=False)
    assert swept.values == sqnr(graph, images).values


@pytest.mark.parametrize("method", ["sqnr", "projected", "orthogonality"])
def test_precisions_that_are_chosen_do_not_count(
    graph: fx.GraphModule, images: list[Tensor], method: str
) -> None:
    groups = require(graph, stage="calibrated").groups
    planned = with_choices(graph, {group.name: str(group.candidates[0]) for group in groups})
    before = planned(images[0])
    found = measure(planned, images, method=method, progress=False)
    assert found.values == measure(graph, images, method=method, progress=False).values
    assert torch.equal(planned(images[0]), before)


def never() -> Iterator[Tensor]:
    """Data that must not be read."""
    raise AssertionError("the data was read")
    yield


def test_an_unknown_method_is_an_error_before_any_work(graph: fx.GraphModule) -> None:
    with pytest.raises(FxmpqError, match="no sensitivity method 'hesian'; there are 'hessian'"):
        measure(graph, never(), method="hesian")


@pytest.mark.parametrize("method", METHODS)
def test_methods_without_their_labels_are_an_error_before_any_work(
    graph: fx.GraphModule, method: str
) -> None:
    if not METHODS[method].labels:
        return check_method(method)
    expected = f"'{method}' needs labels: give loss=.*No labels are needed by 'projected', 'sqnr'"
    with pytest.raises(FxmpqError, match=expected):
        measure(graph, never(), method=method)
    return check_method(method, ["loss"])


def test_an_interrupted_measurement_goes_on(
    graph: fx.GraphModule,
    images: list[Tensor],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """What is recorded is not measured again, and the result is the same to the last bit."""
    path = tmp_path / "sweep.journal"
    expected = measure(graph, images, method="sqnr", progress=False)
    calls = 0

    def interrupted(model: fx.GraphModule, batch: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 7:
            raise KeyboardInterrupt
        return model(batch).square().mean()

    arguments = {"method": "sqnr", "score": interrupted, "progress": False, "resume": path}
    with pytest.raises(KeyboardInterrupt):
        measure(graph, images, **arguments)
    recorded = path.read_text().count("\n") - 1
    assert recorded > 0
    first = measure(graph, images, **arguments)
    repeated = calls
    assert measure(graph, images, **arguments).values == first.values
    assert calls == repeated
    # Another score is another run.
    with caplog.at_level(logging.WARNING):
        again = measure(graph, images, method="sqnr", progress=False, resume=path)
    assert "options differ" in caplog.text
    assert again.values == expected.values


def test_journals_tell_models_data_and_calibrations_apart(
    calibrated: Callable[..., fx.GraphModule],
    conv_graph: fx.GraphModule,
    graph: fx.GraphModule,
    images: list[Tensor],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A journal of other ranges or other images is not read."""
    path = tmp_path / "sweep.journal"
    options = {"method": "sqnr", "progress": False, "resume": path}
    measure(graph, images, **options)
    for other, data, named in (
        (graph, images[:1], "data"),
        (calibrated(conv_graph, images[:1]), images[:1], "ranges"),
    ):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            measure(other, data, **options)
        assert f"({named} differ)" in caplog.text


def test_bad_data_is_an_error(graph: fx.GraphModule) -> None:
    with pytest.raises(CalibrationError, match="is empty"):
        measure(graph, [])
    with pytest.raises(BatchError, match="Wrap it in a list"):
        measure(graph, torch.ones(2, 3, 16, 16))
    with pytest.raises(BatchError, match="must have shape"):
        measure(graph, [torch.ones(2, 3, 8, 8)], progress=False)


def test_an_uncalibrated_graph_is_an_error(
    conv_graph: fx.GraphModule, images: list[Tensor]
) -> None:
    with pytest.raises(FxmpqError, match="fxmpq.prepare"):
        measure(conv_graph, images)


@pytest.mark.parametrize("options", [{"probe": 3}, {"seeds": 1}])
def test_an_unknown_option_is_an_error_before_any_work(
    graph: fx.GraphModule, options: dict[str, int]
) -> None:
    name = next(iter(options))
    with pytest.raises(FxmpqError, match=f"no option '{name}' with the method 'projected'"):
        measure(graph, never(), progress=False, **options)
    with pytest.raises(FxmpqError, match="no option 'probes' with the method 'sqnr'; there are '"):
        check_method("sqnr", ["probes"])


def test_which_methods_read_labels() -> None:
    """Those that need a loss, and those whose score is a loss or a metric."""
    assert not reads_labels("projected", {"probes": 2})
    assert not reads_labels("sqnr", {"score": "kl"})
    assert not reads_labels("sqnr", {"score": SCORES["kl"]})
    assert reads_labels("sqnr", {"score": torch.nn.functional.cross_entropy})
    assert reads_labels("layer_loss", {"score": MulticlassAccuracy(2)})
    assert reads_labels("hessian", {})


def scaled(factor: float) -> Callable[[nn.Module, Tensor], Tensor]:
    return lambda model, batch: factor * model(batch).square().mean()


class Doubled(nn.Module):
    """A LightningModule's part that matters here."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.model, self.factor = nn.Identity(), factor

    def training_step(self, batch: Tensor) -> Tensor:
        return self.factor * self.model(batch).square().mean()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"score": scaled(1)}, {"score": scaled(2)}),
        ({"score": StepLoss(Doubled(1))}, {"score": StepLoss(Doubled(2))}),
        ({}, {"average": "samples"}),
    ],
)
def test_a_journal_tells_losses_and_options_apart(
    graph: fx.GraphModule,
    images: list[Tensor],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    one: dict[str, Any],
    other: dict[str, Any],
) -> None:
    """Of one name, and of one class; an option at its default is as if it were left out."""
    path = tmp_path / "sweep.journal"
    settings = {"method": "sqnr", "progress": False, "resume": path}
    measure(graph, images[:1], **settings, **one)
    recorded = path.read_text()
    with caplog.at_level(logging.WARNING):
        measure(graph, images[:1], **settings, **{"average": "ratio", **one})
    assert (path.read_text(), caplog.text) == (recorded, "")
    with caplog.at_level(logging.WARNING):
        found = measure(graph, images[:1], **settings, **other)
    assert "options differ" in caplog.text
    assert found.values == sqnr(graph, images[:1], **other).values


def test_a_metric_with_other_settings_is_another_run(
    graph: fx.GraphModule, images: list[Tensor], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    batches = [(images[0], images[0].flatten(1).argmax(1) % 2)]
    with torch.no_grad():
        classes = graph(images[0]).shape[1]
    settings = {"method": "sqnr", "progress": False, "resume": tmp_path / "sweep.journal"}
    for top, text in ((1, ""), (1, ""), (2, "options differ")):
        metric = MulticlassAccuracy(classes, top_k=top, average="micro")
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            found = measure(graph, batches, score=metric, **settings)
        assert (text in caplog.text) if text else not caplog.text
        assert found.values == sqnr(graph, batches, score=metric).values
