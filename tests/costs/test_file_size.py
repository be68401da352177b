"""Sizes of files, predicted from those that are written."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import fxmpq
from fxmpq.costs.file_size import file_size, fitted
from fxmpq.costs.parts import MetricParts
from fxmpq.costs.table import CostTable
from fxmpq.costs.weights import weight_bytes
from fxmpq.errors import FxmpqError, TargetError
from fxmpq.formats import Precision
from fxmpq.graph.state import Group, state_of
from fxmpq.targets.reference import REFERENCE
from fxmpq.targets.registry import get_target

Plan = dict[str, str]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.Linear(64, 10))


def prepared(target: str, *candidates: str) -> fx.GraphModule:
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    graph = fxmpq.trace(net(), x)
    return fxmpq.prepare(graph, target, candidates=list(candidates))


def predicted(found: MetricParts, plan: Plan) -> float:
    assert found.rows is not None
    return found.fixed + sum(found.rows[group][name] for group, name in plan.items())


def formats(group: Group, name: str) -> dict[str, int]:
    """How many weights and activations a group has in each format."""
    precision = Precision.parse(name)
    found = {}
    if precision.weight is not None:
        found[str(precision.weight_only)] = len(group.layers)
    if precision.activation is not None:
        found[str(precision.activation_only)] = len(group.activation_quantizers)
    return found


def all_plans(groups: tuple[Group, ...]) -> list[Plan]:
    names = [[str(entry) for entry in group.candidates] for group in groups]
    return [
        dict(zip((group.name for group in groups), choice, strict=True))
        for choice in itertools.product(*names)
    ]


def counted(groups: tuple[Group, ...], plan: Plan) -> int:
    return sum(weight_bytes(group, Precision.parse(plan[group.name])) for group in groups)


@pytest.fixture(scope="module")
def groups() -> tuple[Group, ...]:
    """Of three layers, whose candidates tell weights' formats from activations'."""
    return state_of(prepared("reference", "w4", "w8", "w4a8", "w8a8", "fp32")).groups


@given(
    st.integers(0, 10_000),
    st.fixed_dictionaries({name: st.integers(0, 2000) for name in ("w4", "w8", "a8")}),
)
def test_what_formats_add_is_found_exactly(
    groups: tuple[Group, ...], fixed: int, adds: dict[str, int]
) -> None:
    def written(plan: Plan) -> int:
        further = sum(
            amount * adds[name]
            for group in groups
            for name, amount in formats(group, plan[group.name]).items()
        )
        return fixed + counted(groups, plan) + further

    names = ("fp32", "w4", "w8", "w4a8", "w8a8")
    uniform = [{group.name: name for group in groups} for name in names]
    found = fitted(groups, uniform, list(map(written, uniform)))
    assert found.fixed == fixed
    assert found.float_total == written(uniform[0])
    for plan in all_plans(groups):
        assert predicted(found, plan) == pytest.approx(written(plan), abs=len(groups))


@given(st.floats(0.3, 0.99), st.floats(0.3, 0.99))
def test_weights_that_take_less_than_is_counted_shrink_as_a_whole(
    groups: tuple[Group, ...], codes: float, real: float
) -> None:
    """Scales in 2 bytes, and float weights that a runtime narrows."""

    def written(plan: Plan) -> int:
        sizes = {
            group.name: weight_bytes(group, Precision.parse(plan[group.name])) for group in groups
        }
        share = {"w4": codes, "fp32": real}
        return round(sum(size * share.get(plan[name], 1) for name, size in sizes.items()))

    uniform = [{group.name: name for group in groups} for name in ("fp32", "w4", "w8")]
    found = fitted(groups, uniform, list(map(written, uniform)))
    assert found.fixed == 0
    for plan in all_plans(groups):
        if not {"w4a8", "w8a8"} & set(plan.values()):
            assert predicted(found, plan) == pytest.approx(written(plan), abs=2 * len(groups))


@pytest.mark.parametrize("copies", [1, 2])
def test_weights_that_layers_share_may_be_stored_for_each(copies: int) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.mix = nn.Embedding(100, 16), nn.Linear(16, 16)
            self.head = nn.Linear(16, 100, bias=False)
            self.head.weight = self.table.weight

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.mix(self.table(tokens)))

    graph = fxmpq.trace(Tied().eval(), torch.zeros(2, 4, dtype=torch.long))
    graph = fxmpq.prepare(graph, "reference", candidates=["w4a8", "w8a8", "fp32"])
    found = state_of(graph).groups
    assert [len(group.layers) for group in found] == [2, 1]

    def written(plan: Plan) -> int:
        both = [weight_bytes(group, Precision.parse(plan[group.name])) for group in found]
        return 500 + copies * both[0] + both[1]

    uniform = [{group.name: name for group in found} for name in ("fp32", "w4a8", "w8a8")]
    model = fitted(found, uniform, list(map(written, uniform)))
    assert model.fixed == 500
    for plan in all_plans(found):
        assert predicted(model, plan) == pytest.approx(written(plan), abs=2)


def test_no_group_takes_less_than_nothing(groups: tuple[Group, ...]) -> None:
    uniform = [{group.name: name for group in groups} for name in ("fp32", "w8")]
    in_float = counted(groups, uniform[0])
    found = fitted(groups, uniform, [3 * in_float, in_float])
    assert found.rows is not None
    assert min(cost for row in found.rows.values() for cost in row.values()) == 0
    CostTable({"file_size": found.rows}, fixed={"file_size": found.fixed})


@pytest.mark.parametrize(
    ("target", "candidates", "plans"),
    [
        ("reference", ["w2a8", "w4", "w4b32", "w8a8", "fp32"], 20),
        ("onnxruntime", ["w8a8", "fp32"], 1),
    ],
)
def test_mixed_plans_take_what_is_predicted(
    target: str, candidates: list[str], plans: int, tmp_path: Path
) -> None:
    graph = prepared(target, *candidates)
    table = fxmpq.cost(graph, metric="file_size", progress=False)
    batch = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
    calibrated = fxmpq.calibrate(graph, [batch], progress=False)
    mixed = [plan for plan in all_plans(state_of(graph).groups) if len(set(plan.values())) > 1]
    for index, plan in enumerate(random.Random(0).sample(mixed, plans)):
        folder = tmp_path / str(index)
        made = fxmpq.convert(fxmpq.apply(calibrated, plan), output=folder, verify=False)
        written = sum(file.stat().st_size for file in made.files)
        assert table.total("file_size", plan) == pytest.approx(written, rel=0.02)
        assert table.total("weights", plan) < 0.98 * written


def test_groups_that_lack_a_candidate_are_predicted_too(
    bert_graph: fx.GraphModule, token_batches: list[dict[str, Tensor]], tmp_path: Path
) -> None:
    graph = fxmpq.prepare(
        bert_graph,
        "reference",
        candidates=["w2a8", "w8a8"],
        keep={"*query": "w8a8"},
        exclude=["classifier"],
    )
    table = fxmpq.cost(graph, metric="file_size", progress=False)
    calibrated = fxmpq.calibrate(graph, token_batches, progress=False)
    draw = random.Random(0)
    for index in range(5):
        plan = {group: draw.choice(table.precisions(group)) for group in table.groups}
        folder = tmp_path / str(index)
        made = fxmpq.convert(fxmpq.apply(calibrated, plan), output=folder, verify=False)
        written = sum(file.stat().st_size for file in made.files)
        assert table.total("file_size", plan) == pytest.approx(written, rel=0.02)


def test_nothing_is_kept_and_the_graph_stays_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    graph = prepared("reference", "w4a8", "w8a8")
    before, folders = state_of(graph), []

    def write(planned: fx.GraphModule, folder: Path) -> None:
        assert folder.parent == tmp_path
        folders.append((folder, set(state_of(planned).choices.values())))
        REFERENCE.convert(planned, folder)

    found = file_size(graph, write)
    assert [names for _, names in folders] == [{"fp32"}, {"w4a8"}, {"w8a8"}]
    assert not any(tmp_path.iterdir())
    assert state_of(graph) is before
    # Calibrated anew on the same example, only text of scales may differ in length.
    calibrated = fxmpq.calibrate(graph, [torch.ones(2, 16)], progress=False)
    again = file_size(calibrated, REFERENCE.convert)
    assert again.float_total == found.float_total
    plan = {"0": "w4a8", "2": "w8a8", "3": "w4a8"}
    assert predicted(again, plan) == pytest.approx(predicted(found, plan), rel=0.01)


@pytest.mark.parametrize("name", ["inductor", "cuda", "cuda-bf16"])
def test_files_of_the_reference_are_written_without_making_anything_else(name: str) -> None:
    def convert(graph: fx.GraphModule, output: Path | None) -> None:
        raise AssertionError

    target = replace(get_target(name), convert=convert)
    graph = prepared(name, "w8a8")
    table = fxmpq.cost(graph, target, metric="file_size", progress=False)
    as_reference = file_size(prepared("reference", "w8a8"), REFERENCE.convert)
    plan = dict.fromkeys(table.groups, "w8a8")
    assert table.total("file_size", plan) == pytest.approx(predicted(as_reference, plan), rel=0.02)


def test_a_described_target_takes_what_its_base_writes(tmp_path: Path) -> None:
    file = tmp_path / "npu.toml"
    file.write_text(
        'name = "npu"\ndescription = "an NPU"\nbased_on = "reference"\n'
        "[operators]\nlinear = { weights = [4, 8], activations = [8] }\n"
    )
    graph = prepared(str(file), "w4a8", "w8a8")
    table = fxmpq.cost(graph, file, metric="file_size", progress=False)
    base = file_size(prepared("reference", "w4a8", "w8a8"), REFERENCE.convert)
    plan = {"0": "w4a8", "2": "w8a8", "3": "w4a8"}
    assert table.total("file_size", plan) == pytest.approx(predicted(base, plan), rel=0.02)
    with pytest.raises(TargetError, match=r"name the file.*npu.toml.*file_size"):
        fxmpq.cost(graph, metric="file_size")


def test_it_is_a_limit_and_what_is_minimised(tmp_path: Path) -> None:
    batch = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    options = {"target": "reference", "candidates": ["w2a8", "w4a8", "w8a8"], "progress": False}
    limit = "file_size=7.5kB,activation_memory=1kB"
    found = fxmpq.quantize(net(), [batch], budget=limit, **options)
    assert found.plan.costs["file_size"] <= 7500
    assert len(set(found.plan.choices.values())) > 1
    made = fxmpq.convert(found.graph, output=tmp_path)
    written = sum(file.stat().st_size for file in made.files)
    assert written == pytest.approx(found.plan.costs["file_size"], rel=0.01)
    least = fxmpq.quantize(net(), [batch], budget="minimize=file_size,sqnr=10", **options).plan
    assert least.costs["file_size"] < found.costs.largest("file_size")


def test_what_writes_nothing_is_an_error() -> None:
    graph = prepared("reference", "w8a8")
    with pytest.raises(FxmpqError, match="'reference' wrote no files.*limit 'weights'"):
        file_size(graph, lambda planned, folder: None)


def test_unknown_names_and_unprepared_graphs_are_errors(conv_graph: fx.GraphModule) -> None:
    with pytest.raises(FxmpqError, match="fxmpq.prepare"):
        file_size(conv_graph, REFERENCE.convert)
    graph = prepared("reference", "w8a8")
    with pytest.raises(TargetError, match="no target 'referense'"):
        fxmpq.cost(graph, "referense", metric="file_size")
    with pytest.raises(FxmpqError, match="no further cost 'filesize'.*'file_size'"):
        fxmpq.cost(graph, metric="filesize")


def test_biases_that_layers_get_when_they_are_quantized_count(tmp_path: Path) -> None:
    x = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    layer = nn.Sequential(nn.Linear(4, 500, bias=False))
    graph = fxmpq.prepare(fxmpq.trace(layer, x), "reference", candidates=["w8a8"])
    found = file_size(graph, REFERENCE.convert)
    planned = fxmpq.apply(fxmpq.calibrate(graph, [x], progress=False), {"0": "w8a8"})
    made = fxmpq.convert(planned, output=tmp_path)
    written = sum(file.stat().st_size for file in made.files)
    assert predicted(found, {"0": "w8a8"}) == pytest.approx(written, rel=0.02)
    assert written > weight_bytes(*state_of(graph).groups, Precision(8, 8)) + 4 * 500
