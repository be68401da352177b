"""A quantized small network with labelled data, and a report made by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fxmpq.pipeline import quantize
from fxmpq.quantized import Quantized
from fxmpq.report.report import CurvePoint, Entry, LayerRow, Report


@pytest.fixture(scope="session")
def quantized(conv_net: nn.Module, images: list[Tensor]) -> Quantized:
    return quantize(
        conv_net,
        images,
        target="onnxruntime",
        budget="weights=20%",
        candidates=["w2a8", "w4a8", "w8a8"],
        progress=False,
    )


@pytest.fixture(scope="session")
def labels(conv_net: nn.Module, images: list[Tensor]) -> Tensor:
    """What the float model says, except for the last sample."""
    with torch.no_grad():
        found = conv_net(torch.cat(images)).argmax(dim=1)
    found[-1] = (found[-1] + 1) % 5
    return found


@pytest.fixture
def report() -> Report:
    return Report(
        "A small network",
        entries={
            "float": Entry(0.9375, 131.0, 1_000_000, 30_000_000_000, 1.0),
            "mixed": Entry(0.935, 25.0, 150_000, 1_500_000_000, 0.5),
            "w8a8": Entry(0.9365, 38.0, 260_000, 2_000_000_000, 0.52),
            "w4a8": Entry(0.92, 12.0, 135_000, 1_000_000_000, 0.51),
            "w2a8": Entry(0.3, 1.0, 70_000, 500_000_000, 0.5),
        },
        model="a model",
        data="some data",
        target="onnxruntime",
        budget="weights=15%",
        method="projected",
        calibration_samples=512,
        test_samples=4000,
        layers=(
            LayerRow("stem", "stem", "w8a8", 50.0, 1000, 1_000_000, "QLinearConv"),
            LayerRow("block.conv1", "block.conv1", "w4a8", 40.0, 2000, 2_000_000, "QLinearConv"),
            LayerRow("block.short", "block.conv1", "w4a8", 40.0, 500, 500_000, "QLinearConv"),
            LayerRow("head", "head", "fp32", None, 4000, 3_000_000, "float", "kept by <you>"),
            LayerRow("attention.0", "", "fp32", None, 0, 7_000_000, "float", "it is fused"),
        ),
        curve=(
            CurvePoint(70_000, 4.0),
            CurvePoint(100_000, 10.0),
            CurvePoint(150_000, 26.0),
            CurvePoint(260_000, 39.0),
        ),
        predicted_sqnr_db=26.0,
        agreement_db=41.0,
        gap=0.0,
        search_seconds={"trace": 1.0, "measure": 2.5},
        environment={"python": "3.12", "cpu": "a processor"},
        files={"model.onnx": 200_000},
    )
