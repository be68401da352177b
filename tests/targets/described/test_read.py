from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx

import fxmpq
from fxmpq.errors import PrecisionError, TargetError
from fxmpq.formats import Precision
from fxmpq.graph.state import require
from fxmpq.targets.described.read import read_target
from fxmpq.targets.executorch import EXECUTORCH
from fxmpq.targets.registry import TARGETS
from fxmpq.targets.target import Target

EXAMPLES = Path(__file__).parents[3] / "docs" / "examples"
SMALLEST = """
name = "npu"
description = "an example"
default_candidates = ["w8a8"]
operators.conv = {weights = [4, 8], activations = [8]}
operators.linear = {weights = [8], activations = [8]}
"""


def read(tmp_path: Path, text: str) -> Target:
    file = tmp_path / "npu.toml"
    file.write_text(text)
    return read_target(file, TARGETS)


def test_what_is_left_out_is_as_in_the_target_below(tmp_path: Path) -> None:
    base = TARGETS["onnxruntime"]
    found = read(tmp_path, SMALLEST + 'based_on = "onnxruntime"\n')
    assert found.convert is base.convert
    assert found.packages == base.packages
    assert (found.rules.fusions, found.rules.through) == (base.rules.fusions, base.rules.through)
    assert found.rules.quantize_outputs_of == base.rules.quantize_outputs_of
    assert set(found.rules.operators) == {"conv", "linear"}
    assert found.rules.default_candidates == (Precision(8, 8),)


def test_default_candidates_that_are_left_out_are_those_that_run(tmp_path: Path) -> None:
    found = read(tmp_path, SMALLEST.replace('default_candidates = ["w8a8"]', ""))
    assert found.rules.default_candidates == (Precision(4, 8), Precision(8, 8))


def test_biases_are_integers_if_the_file_or_the_converter_says_so(tmp_path: Path) -> None:
    text = """
    name = "npu"
    description = "an example"
    [operators.conv]
    weights = [8]
    activations = [8]
    [operators.linear]
    weights = [8]
    activations = [8]
    integer_biases = true
    """
    plain = read(tmp_path, text).rules.operators
    assert (plain["conv"].bias_width, plain["linear"].bias_width) == (None, 0)
    based = read(tmp_path, 'based_on = "onnxruntime"\n' + text).rules.operators
    assert based["conv"].bias_width == TARGETS["onnxruntime"].rules.operators["conv"].bias_width
    assert based["linear"].bias_width == 0


def test_of_what_is_left_out_only_what_the_file_runs_is_inherited(tmp_path: Path) -> None:
    text = """
    name = "npu"
    description = "an example"
    based_on = "onnxruntime"
    [operators.linear]
    weights = [8]
    activations = [8, "float"]
    scales = ["channel", "block"]
    block_sizes = [32]
    """
    rules = read(tmp_path, text).rules
    assert rules.quantize_outputs_of == {"add"}
    linear = rules.operators["linear"]
    assert linear.runs(Precision.parse("w8b32"))
    assert not linear.runs(Precision.parse("w8b32a8"))


def test_what_is_said_holds(tmp_path: Path) -> None:
    text = """
    fusions = [["conv", "relu"]]
    joins = ["shared_weight", "shared_input", "added"]
    quantize_outputs_of = ["conv", "add"]
    shared_ranges = ["add"]
    through = ["max_pool2d"]
    symmetric_inputs_of = ["conv", "add"]
    quantize_residuals_of = ["conv"]
    """
    rules = read(tmp_path, SMALLEST + text).rules
    assert rules.quantize_residuals_of == {"conv"}
    assert rules.symmetric_inputs_of == {"conv", "add"}
    assert rules.fusions == (("conv", "relu"),)
    assert rules.joins == ("shared_weight", "shared_input", "added")
    assert rules.quantize_outputs_of == {"conv", "add"}
    assert rules.shared_ranges == {"add"}
    assert torch.ops.aten.max_pool2d.default in rules.through


def test_of_what_is_inherited_only_that_which_is_stored_is_left(tmp_path: Path) -> None:
    base = SMALLEST.replace("[4, 8]", "[8]") + "based_on = 'executorch'\n"
    assert read(tmp_path, base).rules.stored_if_read == EXECUTORCH.rules.stored_if_read == {"add"}
    assert not read(tmp_path, base + "quantize_outputs_of = ['conv']").rules.stored_if_read


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name = ", "is no TOML"),
        (SMALLEST + "fusion = []", "fusion: there is no such key; closest: 'fusions'"),
        (SMALLEST + "joins = ['adds']", "joins by 'adds'; there are 'added'"),
        (SMALLEST + "fusions = [['conv', 'rleu']]", "fuses 'rleu', which is neither"),
        (SMALLEST + "through = ['max_pol2d']", "through names 'max_pol2d'"),
        (SMALLEST + "symmetric_inputs_of = ['experts']", "symmetric inputs of 'experts', which is"),
        (SMALLEST + "through = ['name']", "through names 'name', which is no ATen operator"),
        (
            SMALLEST + "based_on = 'onnxruntime'\nthrough = ['relu']",
            "'relu', which the converter of 'onnxruntime' does not know; it knows max_pool2d",
        ),
        (SMALLEST + "operators.embedding = {weigths = [8]}", "closest: 'weights'"),
        (SMALLEST + "metrics.cycles.operators.conv.per_layers = 1", "closest: 'per_layer'"),
        (SMALLEST + "metrics.'a,b'.per_layer = 1", "metrics.a,b: string should match"),
        (SMALLEST + "metrics.sqnr.per_mac = {w8a8 = 1}", "'sqnr' means something else in a budget"),
        (
            'name = "npu"\ndescription = "an example"\noperators.conv = {weights = [8]}',
            "default_candidates is missing, and the operators run none of those of 'reference'",
        ),
        (SMALLEST + "based_on = 'onnx'", "the targets to base one on are reference"),
        (SMALLEST.replace("npu", "reference"), "'reference' is taken"),
        (SMALLEST.replace("conv", "convolution"), "no kind of operator 'convolution'"),
        (SMALLEST.replace("[4, 8]", "[4, 80]"), "operators.conv.weights"),
        (SMALLEST.replace("[4, 8]", "[4, 8.0]"), "input should be a valid integer; found 8.0"),
        (SMALLEST.replace("s = [8]}", "s = [8.0]}"), "input should be a valid integer; found 8.0"),
        (SMALLEST.replace("[8]}", "[8], block_sizes = [32.0]}"), "integer; found 32.0"),
        (SMALLEST.replace("weights = [4, 8], ", ""), "operators.conv has neither weights nor"),
        (SMALLEST.replace('"w8a8"', '"w8x8"'), "cannot read the precision 'w8x8'"),
        (SMALLEST.replace('"w8a8"', '"w2a8"'), "cannot run w2a8"),
        (SMALLEST + "metrics.cycles.per_mac = {w8a8 = -1}", "metrics.cycles.per_mac.w8a8"),
        (SMALLEST + "metrics.cycles.per_layer = inf", "metrics.cycles.per_layer"),
        (SMALLEST + "metrics.cycles.macs_per_unit = {w8a8 = 0}", "macs_per_unit.w8a8"),
        (SMALLEST + "metrics.cycles.per_mac = {w4a8 = 1}", "no figure for conv at w8a8"),
        (SMALLEST + "metrics.bops.per_mac = {w8a8 = 1}", "'bops' is a metric of every target"),
        (
            SMALLEST + "operators.embedding = {weights = [8], integer_biases = true}",
            "have: kinds conv, conv_transpose, linear, with widths in activations",
        ),
        (
            SMALLEST.replace("[4, 8], activations = [8]", "[4, 8], integer_biases = true"),
            "operators.conv has integer_biases, which layers with biases on integers have",
        ),
        (
            SMALLEST + "metrics.c = {per_mac = {w8a8 = 1}, macs_per_unit = {w8a8 = 1}}",
            "w8a8 has a figure in per_mac and one in macs_per_unit",
        ),
        (
            SMALLEST.replace("[4, 8]", "[3, 8]") + "based_on = 'onnxruntime'",
            "based on 'onnxruntime', which runs weights",
        ),
        (
            SMALLEST.replace("weights = [4, 8]", "dynamic = ['tensor'], weights = [4, 8]"),
            "operators.conv asks for weights [4, 8], activations [8], dynamic ['d']",
        ),
    ],
)
def test_what_cannot_be_used_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(TargetError, match=r"npu\.toml") as caught:
        read(tmp_path, text)
    assert message in str(caught.value)


def test_a_kind_that_the_target_below_lacks_is_named(tmp_path: Path) -> None:
    base = TARGETS["onnxruntime"]
    rest = {kind: rule for kind, rule in base.rules.operators.items() if kind != "conv_transpose"}
    known = {"small": replace(base, rules=replace(base.rules, operators=rest))}
    file = tmp_path / "npu.toml"
    file.write_text(SMALLEST + "based_on = 'small'\noperators.conv_transpose = {weights = [8]}")
    with pytest.raises(TargetError, match="has no quantized conv_transpose; it has conv, linear"):
        read_target(file, known)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"cannot read .*npu\.toml: No such file"):
        read_target(tmp_path / "npu.toml", TARGETS)


@pytest.mark.parametrize("name", ["npu", "microcontroller"])
def test_the_examples_walk_all_the_way(
    conv_net: torch.nn.Module, images: list[Tensor], name: str, tmp_path: Path
) -> None:
    file = EXAMPLES / f"{name}.toml"
    result = fxmpq.quantize(
        conv_net, images, target=file, budget="cycles=30%,weights=30%", progress=False
    )
    assert result.plan.relative["cycles"] <= 0.3
    converted = result.convert(tmp_path)
    assert (converted.target, converted.sqnr_db) == (name, float("inf"))
    again = fxmpq.convert(result.graph, str(file))
    assert torch.equal(*[found.run(images[0])[0] for found in (converted, again)])
    with pytest.raises(TargetError, match=rf"a file describes; .*'{name}.toml'\)"):
        fxmpq.convert(result.graph)


def test_costs_are_those_of_the_file(conv_graph: fx.GraphModule, tmp_path: Path) -> None:
    text = (
        SMALLEST
        + """
    [metrics.energy]
    per_model = 7
    per_layer = 5
    per_weight_byte = 2
    per_mac = {w8a8 = 0.5, w4a8 = 0.25, fp32 = 3}
    operators.linear = {per_mac = {w8a8 = 0.125}, per_layer = 4}
    """
    )
    target = read(tmp_path, text)
    graph = fxmpq.prepare(conv_graph, target, candidates=["w4a8", "w8a8"])
    table = fxmpq.cost(graph, target)
    macs = {"conv": 0.0, "linear": 0.0}
    layers = [layer for group in require(graph, stage="prepared").groups for layer in group.layers]
    for layer in layers:
        macs[layer.kind] += layer.macs
    uniform = table.uniform("w8a8")
    size = {"conv": 0.0, "linear": 0.0}
    for group in require(graph, stage="prepared").groups:
        size[group.layers[0].kind] += table.cost("weights", group.name, "w8a8")
    expected = 7 + sum(5 if layer.kind == "conv" else 4 for layer in layers)
    expected += 0.5 * macs["conv"] + 0.125 * macs["linear"] + 2 * sum(size.values())
    assert table.total("energy", uniform) == pytest.approx(expected)
    assert "energy" in table.float_total
    assert "energy" not in fxmpq.cost(graph).metrics


def test_a_candidate_without_a_figure_is_refused(
    conv_graph: fx.GraphModule, tmp_path: Path
) -> None:
    target = read(tmp_path, SMALLEST + "metrics.cycles.per_mac = {w8a8 = 1}")
    graph = fxmpq.prepare(conv_graph, target, candidates=["w4a8", "w8a8"])
    with pytest.raises(fxmpq.FxmpqError, match="may run at w4a8, for which 'cycles' has no"):
        fxmpq.cost(graph, target)
    with pytest.raises(TargetError, match="prepared for 'npu'; prepare it for 'reference'"):
        fxmpq.cost(graph, "reference")


def test_precisions_that_the_hardware_lacks_are_refused(
    conv_graph: fx.GraphModule, tmp_path: Path
) -> None:
    with pytest.raises(PrecisionError, match="target 'npu' cannot run w2a8"):
        fxmpq.prepare(conv_graph, read(tmp_path, SMALLEST), candidates=["w2a8"])


def test_a_described_target_may_quantize_products(
    tmp_path: Path, bert_graph: fx.GraphModule
) -> None:
    found = read(tmp_path, SMALLEST + "operators.matmul = {activations = [8]}\n")
    prepared = fxmpq.prepare(bert_graph, found, products=True)
    groups = [group for group in require(prepared, stage="prepared").groups if group.products]
    assert [group.candidates for group in groups] == [(Precision(None, 8),)] * 4
    with pytest.raises(PrecisionError, match="'npu' has no quantized product"):
        fxmpq.prepare(bert_graph, read(tmp_path, SMALLEST), products=True)


def test_a_file_based_on_tensorrt_keeps_what_its_converter_asks_for(tmp_path: Path) -> None:
    text = """
    name = "jetson"
    description = "an example"
    based_on = "tensorrt"
    [operators.linear]
    weights = [4, 8]
    activations = [8, "float"]
    scales = ["channel", "block"]
    block_sizes = [64]
    """
    rules = read(tmp_path, text).rules
    assert rules.symmetric_inputs_of == {"linear", "add"}
    assert rules.quantize_residuals_of == frozenset()
    names = ["w8a8", "w8", "w4a8", "w4b64", "w4b128", "w4b64a8"]
    linear = rules.operators["linear"]
    assert [name for name in names if linear.runs(Precision.parse(name))] == ["w8a8", "w4b64"]
    assert linear.blocks_are_whole
