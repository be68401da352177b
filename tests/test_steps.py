from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn
from torch._inductor import config

from fxmpq import steps
from fxmpq.costs.figures import KindFigures, MetricFigures
from fxmpq.costs.table import CostTable
from fxmpq.errors import FxmpqError, PatternError, PlanError, PrecisionError, TargetError
from fxmpq.graph.findings import Join
from fxmpq.graph.state import state_of
from fxmpq.graph.trace import trace
from fxmpq.solver.plan import Plan
from fxmpq.steps import apply, cost, further_of, prepare, runtime_of
from fxmpq.targets.registry import get_target

TIMES = {"latency": MetricFigures("latency", KindFigures({"w8a8": 1}))}

Planned = Callable[..., fx.GraphModule]


def test_prepare_reads_names(conv_graph: fx.GraphModule, images: list[Tensor]) -> None:
    prepared = prepare(
        conv_graph,
        "reference",
        candidates=["w4a8", "w8a8"],
        keep={"fc": "w8a8"},
        exclude=["stem*"],
    )
    found = {g.name: [str(c) for c in g.candidates] for g in state_of(prepared).groups}
    assert found == {
        "stem.0": ["fp32"],
        "conv1": ["w4a8", "w8a8"],
        "conv2": ["w4a8", "w8a8"],
        "fc": ["w8a8"],
    }
    assert torch.equal(prepared(images[0]), conv_graph(images[0]))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"target": "onnxruntme"}, TargetError, "'onnxruntime'"),
        ({"candidates": ["w9a8"]}, PrecisionError, "9-bit"),
        ({"candidates": ["int8"]}, PrecisionError, "'w4a8'"),
        ({"candidates": "w4a8"}, PrecisionError, r"a list of precisions, .* write \['w4a8'\]"),
        ({"exclude": "stem*"}, PatternError, r"exclude is a list of patterns .* 'stem\*' alone"),
        ({"target": "onnxruntime", "candidates": ["w3a8"]}, PrecisionError, r"\[2, 4, 8\]"),
        ({"keep": {"fcc": "w8a8"}}, PatternError, "'fc'"),
        ({"exclude": ["head*"]}, PatternError, "no layer matches 'head"),
        ({"ties": "fc"}, PatternError, r"ties is a list of ties, as \['fc'\]"),
        ({"ties": ["fc"]}, PatternError, "matches one layer, 'fc'"),
        (
            {"ties": [("fc", "conv2")], "keep": {"fc": "w4a8", "conv2": "w8a8"}},
            PrecisionError,
            "conv2 at w8a8, fc at w4a8. fc is tied to conv2",
        ),
    ],
)
def test_prepare_refuses_what_cannot_be_served(
    conv_graph: fx.GraphModule, options: dict, error: type[FxmpqError], message: str
) -> None:
    with pytest.raises(error, match=message):
        prepare(conv_graph, **{"target": "reference", **options})


def test_apply_sets_every_group(
    conv_graph: fx.GraphModule, images: list[Tensor], calibrated: Planned
) -> None:
    graph = calibrated(conv_graph, images)
    state = state_of(graph)
    choices = {group.name: "w8a8" for group in state.groups}
    bare = apply(graph, choices)
    planned = apply(graph, Plan(choices, fingerprint=state.fingerprint))
    assert torch.equal(bare(images[0]), planned(images[0]))
    assert state_of(planned).choices == choices
    assert not torch.equal(planned(images[0]), graph(images[0]))


def test_apply_refuses_another_models_plan(
    conv_graph: fx.GraphModule, images: list[Tensor], calibrated: Planned
) -> None:
    graph = calibrated(conv_graph, images)
    choices = {group.name: "w8a8" for group in state_of(graph).groups}
    with pytest.raises(PlanError, match="fingerprint"):
        apply(graph, Plan(choices, fingerprint="other"))
    with pytest.raises(PlanError, match="'conv1'"):
        apply(graph, {**choices, "conv": "w8a8"})
    with pytest.raises(FxmpqError, match="fxmpq.calibrate"):
        apply(prepare(conv_graph, "reference"), choices)


def test_exclude_wins_over_a_broad_keep(conv_graph: fx.GraphModule) -> None:
    prepared = prepare(conv_graph, "reference", keep={"*": "w8a8"}, exclude=["fc"])
    found = {g.name: [str(c) for c in g.candidates] for g in state_of(prepared).groups}
    assert found == {"stem.0": ["w8a8"], "conv1": ["w8a8"], "conv2": ["w8a8"], "fc": ["fp32"]}


def test_ties_reach_the_groups(conv_graph: fx.GraphModule) -> None:
    prepared = prepare(conv_graph, "onnxruntime", ties=[("stem*", "conv2")])
    state = state_of(prepared)
    assert [[layer.name for layer in group.layers] for group in state.groups] == [
        ["stem.0", "conv2"],
        ["conv1", "downsample.0"],
        ["fc"],
    ]
    assert Join("tied", "conv2", "stem.0") in state.joins


def test_latency_is_measured_in_the_runtime(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FXMPQ_CACHE", str(tmp_path))
    graph = prepare(
        trace(nn.Sequential(nn.Linear(8, 4)), torch.randn(2, 8)), "onnxruntime", candidates=["w8a8"]
    )
    table = cost(graph, metric="latency", progress=False)
    # A layer so small may take no longer than the call by itself, whatever the machine does.
    assert 0 <= table.cost("latency", "0", "w8a8") < math.inf
    assert 0 < table.float_total["latency"] < math.inf
    assert 0 < table.total("latency", table.uniform("w8a8")) < math.inf
    assert table.metrics[:-1] == cost(graph).metrics
    # It comes through files, and what is on disk is not measured again.
    assert CostTable.from_json(table.to_json()) == table
    assert cost(graph, metric=["latency"], progress=False) == table


def test_a_target_may_load_models_and_tell_what_decides_in_its_own_way() -> None:
    target = get_target("onnxruntime")
    plain = runtime_of(target)
    own = runtime_of(replace(target, load=lambda graph: print, conditions=lambda: {"clock": 3}))
    assert plain is not None
    assert own is not None
    assert own.load(fx.GraphModule({}, fx.Graph())) is print
    assert own.conditions() == {**plain.conditions(), "clock": 3}


@pytest.mark.parametrize("name", ["onnxruntime", "openvino", "inductor", "executorch"])
def test_runtimes_on_this_machine_can_be_measured(name: str) -> None:
    runtime = runtime_of(get_target(name))
    assert runtime is not None
    assert runtime.name == name
    assert runtime.conditions()["target"] == name


def test_what_a_target_needs_is_looked_for_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    graph = prepare(trace(nn.Sequential(nn.Linear(8, 4)), torch.randn(2, 8)), "inductor")
    with config.patch({"cpp.cxx": ("no-such-compiler",)}):
        # What runs nothing takes no compiler.
        assert "energy" in cost(graph, metric="energy").metrics
        monkeypatch.setattr(steps, "with_further", lambda *_: pytest.fail("it was measured"))
        for target in (None, "inductor"):
            with pytest.raises(TargetError, match=r"torch finds no C\+\+ compiler: install one"):
                cost(graph, target, metric=["energy", "latency"])


def test_latency_is_refused_where_it_cannot_be_measured(
    conv_graph: fx.GraphModule, tmp_path: Path
) -> None:
    prepared = prepare(conv_graph, "reference")
    with pytest.raises(FxmpqError, match="latency cannot be measured for target 'reference'"):
        cost(prepared, metric="latency")
    with pytest.raises(FxmpqError, match="no further cost 'weights'"):
        cost(prepared, metric="weights")
    file = tmp_path / "npu.toml"
    file.write_text(
        'name = "npu"\ndescription = "an NPU"\nbased_on = "onnxruntime"\n'
        "[operators]\nconv = { weights = [8], activations = [8] }\n"
    )
    described = prepare(conv_graph, file, candidates=["w8a8"])
    with pytest.raises(TargetError, match=r"name the file, as fxmpq.cost\(graph, 'npu.toml', metr"):
        cost(described, metric="latency")
    with pytest.raises(FxmpqError, match="latency cannot be measured for target 'npu'"):
        cost(described, file, metric="latency")
    assert further_of(replace(get_target("onnxruntime"), metrics=TIMES), ["latency"]) == ()
    assert further_of(get_target("onnxruntime"), ["weights", "latency"]) == ("latency",)
