from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx

from fxmpq.errors import BatchError, CalibrationError, FxmpqError, PlanError, TargetError
from fxmpq.graph.trace import trace
from fxmpq.steps import apply
from fxmpq.targets.convert import REQUIRED_AGREEMENT_DB, convert
from fxmpq.targets.reference import REFERENCE
from fxmpq.targets.target import Converted, Target

Made = Callable[..., fx.GraphModule]


@pytest.fixture(scope="module")
def calibrated_graph(
    calibrated: Made, conv_graph: fx.GraphModule, images: list[Tensor]
) -> fx.GraphModule:
    return calibrated(conv_graph, images)


@pytest.fixture(scope="module")
def planned(calibrated_graph: fx.GraphModule, uniform: Made) -> fx.GraphModule:
    return uniform(calibrated_graph)


def wrong_by(factor: float) -> Target:
    """The reference target, with outputs that are off."""

    def converter(graph: fx.GraphModule, output: Path | None) -> Converted:
        made = REFERENCE.convert(graph, output)
        return replace(made, run=lambda batch: [y * factor for y in made.run(batch)])

    return replace(REFERENCE, convert=converter)


def test_the_prepared_target_is_the_default(planned: fx.GraphModule) -> None:
    made = convert(planned)
    assert made.target == "reference"
    assert made.files == ()
    assert made.sqnr_db == math.inf


def test_the_target_may_be_named_again(planned: fx.GraphModule) -> None:
    assert convert(planned, "reference").sqnr_db == convert(planned, REFERENCE).sqnr_db == math.inf


def test_another_target_is_an_error(planned: fx.GraphModule) -> None:
    with pytest.raises(TargetError, match="convert for 'onnxruntime', but .* for 'reference'"):
        convert(planned, "onnxruntime")
    with pytest.raises(TargetError, match="no target 'coreml'"):
        convert(planned, "coreml")


def test_missing_steps_are_errors(
    conv_graph: fx.GraphModule, calibrated_graph: fx.GraphModule
) -> None:
    with pytest.raises(FxmpqError, match="fxmpq.prepare"):
        convert(conv_graph)
    with pytest.raises(PlanError, match=r"no chosen precisions; call fxmpq.apply\(graph, plan\)"):
        convert(calibrated_graph)


def test_a_model_without_layers_is_an_error(calibrated: Made) -> None:
    x = torch.randn(2, 3)
    prepared = calibrated(trace(torch.nn.ReLU(), x), [x])
    with pytest.raises(FxmpqError, match="nothing to quantize: no convolution"):
        convert(apply(prepared, {}))


def test_a_conversion_that_disagrees_is_an_error(planned: fx.GraphModule) -> None:
    with pytest.raises(TargetError, match=r"disagrees with the simulation: 20.0 dB SQNR"):
        convert(planned, wrong_by(1.1))
    with pytest.raises(TargetError, match="disagrees with the simulation: nan dB"):
        convert(planned, wrong_by(math.nan))
    assert convert(planned, wrong_by(1.01)).sqnr_db == pytest.approx(40, abs=0.01)
    assert REQUIRED_AGREEMENT_DB < 40


def test_the_check_can_be_left_out(planned: fx.GraphModule) -> None:
    assert math.isnan(convert(planned, wrong_by(2.0), verify=False).sqnr_db)


def test_the_worst_of_the_given_batches_counts(
    planned: fx.GraphModule, images: list[Tensor]
) -> None:
    seen: list[int] = []

    def converter(graph: fx.GraphModule, output: Path | None) -> Converted:
        made = REFERENCE.convert(graph, output)

        def run(batch: Tensor) -> list[Tensor]:
            seen.append(len(batch))
            return [y * (1.001 if len(batch) == 3 else 1.01) for y in made.run(batch)]

        return replace(made, run=run)

    target = replace(REFERENCE, convert=converter)
    found = convert(planned, target, verify=iter([images[0][:3], images[1]]))
    assert seen == [3, 6]
    assert found.sqnr_db == pytest.approx(40, abs=0.01)


def test_unusable_batches_to_check_on_are_errors(
    planned: fx.GraphModule, images: list[Tensor]
) -> None:
    with pytest.raises(CalibrationError, match="the verification data is empty"):
        convert(planned, verify=[])
    with pytest.raises(BatchError, match="Wrap it in a list"):
        convert(planned, verify=images[0])
    with pytest.raises(BatchError, match="must have shape"):
        convert(planned, verify=[torch.ones(2, 3, 4, 4)])


def test_the_folder_is_made(planned: fx.GraphModule, tmp_path: Path) -> None:
    made = convert(planned, output=str(tmp_path / "some" / "folder"))
    assert all(file.is_file() for file in made.files)
    assert {file.parent for file in made.files} == {tmp_path / "some" / "folder"}
