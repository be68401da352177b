from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
import torch
from torch import Tensor, fx, nn

from fxmpq.formats import Precision
from fxmpq.graph.state import require
from fxmpq.graph.switch import with_choices
from fxmpq.graph.trace import trace
from fxmpq.targets.convert import convert
from fxmpq.targets.openvino.compiled import OpenvinoModel
from fxmpq.targets.target import Converted

Made = Callable[..., fx.GraphModule]
Check = Callable[[Converted, fx.GraphModule, float], None]


@pytest.fixture(scope="module")
def planned(
    calibrated: Made, in_turn: Made, conv_graph: fx.GraphModule, images: list[Tensor]
) -> fx.GraphModule:
    return in_turn(calibrated(conv_graph, images, "openvino"))


@pytest.fixture(scope="module")
def made(
    planned: fx.GraphModule, images: list[Tensor], tmp_path_factory: pytest.TempPathFactory
) -> Converted:
    return convert(planned, output=tmp_path_factory.mktemp("ir"), verify=images)


@pytest.fixture(scope="module")
def planned_bert(
    in_turn: Made,
    calibrated: Made,
    bert_graph: fx.GraphModule,
    token_batches: list[dict[str, Tensor]],
) -> fx.GraphModule:
    candidates = [Precision.parse(name) for name in ("w4a8", "w4", "w3a8", "w2", "w8a8")]
    return in_turn(calibrated(bert_graph, token_batches, "openvino", candidates=candidates))


@pytest.fixture(scope="module")
def made_bert(
    planned_bert: fx.GraphModule,
    token_batches: list[dict[str, Tensor]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Converted:
    return convert(planned_bert, output=tmp_path_factory.mktemp("bert"), verify=token_batches)


def stored_types(made: Converted) -> set[str]:
    """The types in which the file holds its constants."""
    model = ov.Core().read_model(made.files[0])
    constants = [node for node in model.get_ops() if node.get_type_name() == "Constant"]
    return {node.get_element_type().get_type_name() for node in constants}


def executed(made: Converted) -> list[str]:
    assert isinstance(made.module, OpenvinoModel)
    nodes = made.module.compiled.get_runtime_model().get_ordered_ops()
    return [node.get_rt_info()["layerType"].value for node in nodes]


def test_the_files_stand_alone(made: Converted, images: list[Tensor]) -> None:
    assert [file.name for file in made.files] == ["model.xml", "model.bin", "compile.json"]
    assert {file.name for file in made.files[0].parent.iterdir()} == {f.name for f in made.files}
    options = json.loads(made.files[2].read_text())
    assert options == {
        "CPU": {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
    }
    compiled = ov.Core().compile_model(made.files[0], "CPU", options["CPU"])
    for batch in (images[0], images[1][:1]):
        np.testing.assert_array_equal(compiled([batch.numpy()])[0], made.run(batch)[0].numpy())


def test_the_file_forbids_to_quantize_what_the_plan_does_not(made: Converted) -> None:
    compiled = ov.Core().compile_model(made.files[0], "CPU")
    assert compiled.get_property("DYNAMIC_QUANTIZATION_GROUP_SIZE") == 0


def test_files_are_reproducible(made: Converted, planned: fx.GraphModule, tmp_path: Path) -> None:
    again = convert(planned, output=tmp_path, verify=False)
    for one, other in zip(made.files, again.files, strict=True):
        assert one.read_bytes() == other.read_bytes()


def test_the_runtime_agrees_with_the_simulation(
    made: Converted, planned: fx.GraphModule, check_batch_sizes: Check
) -> None:
    assert made.sqnr_db > 60
    check_batch_sizes(made, planned, 30)


def test_every_layer_runs_on_integers(made: Converted) -> None:
    assert [(row.layer, row.asked, row.reason) for row in made.layers] == [
        ("stem.0", "w2a8", ""),
        ("conv1", "w3a8", ""),
        ("downsample.0", "w3a8", ""),
        ("conv2", "w4a8", ""),
        ("fc", "w6a8", ""),
    ]
    kinds = ["Convolution"] * 4 + ["FullyConnected"]
    assert [row.kernel.split()[0] for row in made.layers] == kinds
    assert all(row.kernel.lower().endswith("i8") for row in made.layers)


def test_codes_are_stored_in_their_width(made: Converted) -> None:
    assert stored_types(made) >= {"u2", "u3", "i4", "u6"}


def test_bert_runs_with_masks_and_lengths(
    made_bert: Converted, planned_bert: fx.GraphModule, check_masks_and_lengths: Check
) -> None:
    assert made_bert.sqnr_db > 60
    check_masks_and_lengths(made_bert, planned_bert, 30)


def test_weight_only_layers_read_codes_on_float_input(made_bert: Converted) -> None:
    rows = [row for row in made_bert.layers if row.kernel.startswith("FullyConnected")]
    assert len(rows) == 2 * 6 + 2
    assert not any(row.reason for row in rows)
    for row in rows:
        if row.asked.endswith("a8"):
            assert row.kernel.lower().endswith("i8")
        else:
            stored = {"w2": "u2", "w4": "i4"}[row.asked]
            assert row.kernel.endswith(f"f32 on {stored} weights")
    assert {row.asked for row in rows} >= {"w4", "w2", "w3a8", "w8a8"}


def test_tables_are_looked_up_in_codes(made_bert: Converted) -> None:
    rows = [row for row in made_bert.layers if "embeddings" in row.layer]
    assert len(rows) == 3
    for row in rows:
        assert row.kernel.startswith("Gather ")
        assert row.kernel.endswith("on i8 weights")
        assert row.reason == ""
    floats = [row for row in made_bert.layers if row.kernel == "float"]
    assert all("attention" in row.reason or "product" in row.reason for row in floats)


class Wide(nn.Module):
    """Two layers and a table that shares its weight with the second."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.hidden = nn.Embedding(150, 200), nn.Linear(200, 200)
        self.head = nn.Linear(200, 150, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.hidden(self.table(ids)).relu())


def test_fewer_bits_make_a_smaller_file_and_shared_weights_are_stored_once(
    calibrated: Made, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    ids = torch.randint(150, (4, 3))
    names = ["w2a8", "w3a8", "w4a8", "w6a8", "w8a8", "w4b50", "w6b64"]
    candidates = [Precision.parse(name) for name in names]
    ready = calibrated(trace(Wide(), ids), [ids], "openvino", candidates=candidates)
    groups = [group.name for group in require(ready, stage="calibrated").groups]
    weights, biases = 200 * 200 + 150 * 200, 200 + 150
    for name in ("w3a8", "w8a8", "w6b64", "w4b50"):
        graph = with_choices(ready, dict.fromkeys(groups, name))
        made = convert(graph, output=tmp_path / name)
        precision = Precision.parse(name)
        assert made.sqnr_db > 60
        scales = 350 if precision.activation_bits else 350 * 4
        # Blocks of 64 do not fill 200 values: the last is filled up.
        filled = weights * 256 / 200 if "b64" in name else weights
        assert precision.weight_bits is not None
        expected = filled * precision.weight_bits / 8 + 4 * (scales + biases)
        assert made.files[1].stat().st_size == pytest.approx(expected, abs=400)


def test_options_unused_inputs_and_integer_outputs(check_options: Callable[[str], None]) -> None:
    check_options("openvino")


class Branches(nn.Module):
    """What runtimes meet between convolutions: concatenation, gates, a float layer."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding="same", groups=8)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.gate = nn.Conv2d(8, 8, 1)
        self.last = nn.Conv2d(8, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.left(x).relu(), self.right(x)], 1)
        x = self.grouped(nn.functional.relu6(self.depthwise(x)))
        x = x * torch.sigmoid(self.gate(x.mean((2, 3), keepdim=True)))
        return self.last(x).mean((2, 3))


def test_branches_gates_and_layers_the_user_keeps(calibrated: Made, uniform: Made) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 8, 8)
    graph = calibrated(trace(Branches().eval(), x), [x], "openvino", exclude=["gate", "depthwise"])
    made = convert(uniform(graph, 2))
    assert made.sqnr_db > 45
    rows = {row.layer: row for row in made.layers}
    for name in ("left", "right", "grouped", "last"):
        assert rows[name].kernel.lower().endswith("i8")
        assert rows[name].reason == ""
    for name in ("gate", "depthwise"):
        assert rows[name].reason == "kept in float by the user"
        assert rows[name].kernel.startswith("Convolution ")
        assert rows[name].kernel.endswith("f32")


@pytest.mark.parametrize("rank", [1, 3])
def test_convolutions_of_other_ranks(
    convolutions_of_rank: Callable[[int, str], Converted], rank: int
) -> None:
    made = convolutions_of_rank(rank, "openvino")
    assert made.sqnr_db > 60
    assert all(row.kernel.lower().endswith("i8") for row in made.layers)


def test_weight_only_convolutions_are_small_and_say_that_they_run_in_float(
    calibrated: Made, uniform: Made, conv_graph: fx.GraphModule, images: list[Tensor]
) -> None:
    ready = calibrated(conv_graph, images, "openvino", candidates=[Precision(4)])
    made = convert(uniform(ready), verify=images)
    assert made.sqnr_db > 100
    for row in made.layers:
        expanded = "" if row.layer == "fc" else "the runtime expands its weights to float"
        assert (row.asked, row.reason) == ("w4", expanded)


def test_blocks_go_with_float_activations_only(
    calibrated: Made, conv_graph: fx.GraphModule, images: list[Tensor]
) -> None:
    with pytest.raises(ValueError, match=r"cannot run w4b32a8; .*linear: .*per block \(weight-on"):
        calibrated(conv_graph, images, "openvino", candidates=[Precision.parse("w4b32a8")])


def test_a_float_plan_runs_in_float(all_in_float: Callable[[str], Converted]) -> None:
    made = all_in_float("openvino")
    assert made.sqnr_db > 100
    assert "FakeQuantize" not in executed(made)
