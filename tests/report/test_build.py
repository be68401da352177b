from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fxmpq.pipeline import quantize
from fxmpq.report.build import build_report
from fxmpq.report.report import Report


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("reference")


@pytest.fixture(scope="module")
def said() -> list[str]:
    return []


@pytest.fixture(scope="module")
def built(
    conv_net: nn.Module, images: list[Tensor], labels: Tensor, folder: Path, said: list[str]
) -> Report:
    found = quantize(
        conv_net,
        images,
        target="reference",
        budget="weights=20%,energy=90%",
        candidates=["w2a8", "w4a8", "w8a8"],
        progress=False,
    )
    return build_report(
        found,
        images,
        labels,
        title="A title",
        model="a model",
        data="some data",
        calibration_samples=12,
        uniform=["w4a8"],
        output=folder,
        say=said.append,
    )


def test_it_holds_what_was_asked_and_measured(built: Report) -> None:
    assert (built.title, built.model, built.data) == ("A title", "a model", "some data")
    assert (built.target, built.budget, built.method) == (
        "reference",
        "weights=20%,energy=90%",
        "projected",
    )
    assert (built.calibration_samples, built.test_samples, built.latency_samples) == (12, 12, 1)
    assert list(built.entries) == ["float", "mixed", "w4a8"]
    assert [row.layer for row in built.layers] == ["stem.0", "conv1", "downsample.0", "conv2", "fc"]
    assert set(built.search_seconds) == {"trace", "cost", "calibrate", "measure", "solve"}
    assert built.environment["torch"] == torch.__version__
    assert built.gap == 0.0
    assert built.cost_units == {"energy": "pJ"}
    assert built.entries["mixed"].costs["energy"] <= 0.9 * built.entries["float"].costs["energy"]
    assert built.metric == "accuracy"


def test_predictions_are_near_what_was_measured(built: Report) -> None:
    assert built.predicted_sqnr_db == pytest.approx(built.entries["mixed"].sqnr_db, abs=6)
    sizes = [point.weight_bytes for point in built.curve]
    assert sizes[0] < built.entries["mixed"].weight_bytes <= sizes[-1]


def test_the_converted_files_are_listed_with_their_sizes(built: Report, folder: Path) -> None:
    assert built.files == {path.name: path.stat().st_size for path in folder.iterdir()}
    assert set(built.files) == {"model.safetensors", "model.json"}


def test_it_says_what_it_does(built: Report, said: list[str]) -> None:
    assert said == [
        "converting float",
        "converting mixed",
        "converting w4a8",
        "testing on 12 samples",
        "measuring latency",
        "solving along the trade-off curve",
    ]


def test_it_can_be_saved(built: Report) -> None:
    assert Report.from_json(built.to_json()) == built
