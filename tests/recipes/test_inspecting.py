from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from torch import Tensor, fx

from fxmpq.errors import FxmpqError
from fxmpq.graph.state import state_of
from fxmpq.recipes.inspecting import prepared_graph
from fxmpq.steps import prepare
from fxmpq.storage.save import save

NPU = Path(__file__).parents[2] / "docs" / "examples" / "npu.toml"


def test_a_recipe_is_prepared_as_it_says() -> None:
    overrides = ["candidates=[w8a8]", "exclude=[classifier]", "data.calibration_samples=8"]
    state = state_of(prepared_graph("resnet.yaml", overrides))
    assert state.target == "onnxruntime"
    assert {str(c) for group in state.groups for c in group.candidates} == {"w8a8", "fp32"}
    assert [entry.name for entry in state.left_float] == ["classifier"]
    assert state_of(prepared_graph("resnet.yaml", [], "reference")).target == "reference"


def test_ties_of_a_recipe_are_shown() -> None:
    overrides = ["ties=[[stage1.*.conv2], [conv, classifier]]", "data.calibration_samples=8"]
    state = state_of(prepared_graph("resnet.yaml", overrides))
    assert [layer.name for layer in state.group("conv").layers] == ["conv", "classifier"]
    tied = [layer.name for layer in state.group("stage1.0.conv2").layers]
    assert tied == [f"stage1.{block}.conv2" for block in range(3)]


def test_products_of_a_recipe_may_have_widths_of_their_own() -> None:
    overrides = ["candidates=[w8a8, a8]", "data.calibration_samples=8"]
    with pytest.raises(FxmpqError, match="a8 is of products of two activations"):
        prepared_graph("resnet.yaml", overrides)
    state = state_of(prepared_graph("resnet.yaml", [*overrides, "products=true"]))
    assert {str(c) for group in state.groups for c in group.candidates} == {"w8a8"}


def test_a_saved_graph_is_shown_as_it_is(
    conv_graph: fx.GraphModule,
    images: list[Tensor],
    calibrated: Callable[..., fx.GraphModule],
    tmp_path: Path,
) -> None:
    graph = calibrated(conv_graph, images)
    found = prepared_graph(save(graph, tmp_path / "calibrated"))
    assert state_of(found).groups == state_of(graph).groups
    assert state_of(prepared_graph(tmp_path / "calibrated", [], "reference")).calibrated
    with pytest.raises(FxmpqError, match="'onnxruntime'; the graph .* prepared for 'reference'"):
        prepared_graph(tmp_path / "calibrated", [], "onnxruntime")
    with pytest.raises(FxmpqError, match="takes no 'exclude="):
        prepared_graph(tmp_path / "calibrated", ["exclude=[fc]"])


def test_a_saved_graph_may_be_asked_for_by_its_targets_file(
    conv_graph: fx.GraphModule, tmp_path: Path
) -> None:
    folder = save(prepare(conv_graph, NPU), tmp_path / "prepared")
    assert state_of(prepared_graph(folder, [], str(NPU))).target == "npu"
    with pytest.raises(FxmpqError, match="'reference'; the graph .* prepared for 'npu'"):
        prepared_graph(folder, [], "reference")


def test_a_traced_graph_is_prepared(conv_graph: fx.GraphModule, tmp_path: Path) -> None:
    folder = save(conv_graph, tmp_path)
    assert state_of(prepared_graph(folder)).target == "reference"
    assert state_of(prepared_graph(str(folder), [], "onnxruntime")).target == "onnxruntime"


def test_other_folders_and_names_are_told(tmp_path: Path) -> None:
    with pytest.raises(FxmpqError, match="is a folder without graph.json"):
        prepared_graph(tmp_path)
    with pytest.raises(FxmpqError, match="there is no recipe 'nothing.yaml'"):
        prepared_graph("nothing.yaml")
