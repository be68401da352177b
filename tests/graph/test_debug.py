from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

import fxmpq
from fxmpq.errors import LegalityError
from fxmpq.graph.debug import VARIABLE, checked, checked_pass, is_debugging
from fxmpq.graph.legality.stages import ESTABLISHED
from fxmpq.graph.passes import CANONICAL_PASSES
from fxmpq.graph.state import copy_graph, require, state_of
from fxmpq.quantizers.modules import WeightQuantizer
from fxmpq.training.planned import trainable_plan
from fxmpq.training.trainable import trainable

aten = torch.ops.aten
Step = Callable[[], fx.GraphModule]


@pytest.fixture
def debugging(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "1")


@pytest.mark.parametrize(
    ("value", "expected"), [(None, False), ("", False), ("0", False), ("1", True), ("yes", True)]
)
def test_the_variable_switches_it(
    value: str | None, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if value is None:
        monkeypatch.delenv(VARIABLE, raising=False)
    else:
        monkeypatch.setenv(VARIABLE, value)
    assert is_debugging() is expected


def test_nothing_is_looked_at_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    untouchable = object()
    assert checked(untouchable, "a step") is untouchable
    checked_pass(untouchable, CANONICAL_PASSES[0])


@pytest.mark.usefixtures("debugging")
@pytest.mark.parametrize("index", range(len(CANONICAL_PASSES)))
def test_a_pass_that_breaks_a_graph_is_named(index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(graph: fx.GraphModule) -> int:
        CANONICAL_PASSES[index](graph)
        for node in graph.graph.nodes:
            if node.target is aten.relu.default:
                node.target = aten.relu_.default
        return 1

    broken.__name__ = "broken"
    passes = (*CANONICAL_PASSES[:index], broken, *CANONICAL_PASSES[index + 1 :])
    monkeypatch.setattr("fxmpq.graph.trace.CANONICAL_PASSES", passes)
    monkeypatch.setattr("fxmpq.graph.legality.stages.CANONICAL_PASSES", passes)
    monkeypatch.setitem(ESTABLISHED, broken, ESTABLISHED[CANONICAL_PASSES[index]])
    model = nn.Sequential(nn.Conv1d(1, 2, 3), nn.ReLU())
    with pytest.raises(LegalityError, match="after the pass 'broken' the graph .* 'pure'"):
        fxmpq.trace(model, torch.ones(2, 1, 5))


@pytest.mark.usefixtures("debugging")
def test_every_step_is_checked(
    conv_graph: fx.GraphModule,
    images: list[Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[tuple[str, str]] = []

    def note(graph: fx.GraphModule, stage: str, *, after: str) -> None:
        seen.append((after, stage))

    monkeypatch.setattr("fxmpq.graph.debug.check_stage", note)
    graph = fxmpq.trace(nn.Sequential(nn.Linear(4, 3)), torch.ones(2, 4))
    batches = [torch.randn(4, 4)]
    graph = fxmpq.prepare(graph, "reference", candidates=["w4a8", "w8a8"])
    graph = fxmpq.calibrate(graph, batches, progress=False)
    trainable(graph)
    planned = fxmpq.apply(graph, {"0": "w4a8"})
    trainable_plan(planned)
    fxmpq.refine(graph, {"0": "w4a8"}, batches, method="gptq", progress=False)
    fxmpq.load(fxmpq.save(planned, tmp_path))
    assert seen == [
        ("the step 'trace'", "canonical"),
        ("the step 'prepare'", "prepared"),
        ("the step 'calibrate'", "calibrated"),
        ("the step 'trainable'", "trainable"),
        ("the step 'apply'", "planned"),
        ("the step 'trainable_plan'", "trainable"),
        ("the step 'apply'", "planned"),
        ("the step 'refine, method gptq'", "planned"),
        ("the step 'load'", "planned"),
    ]


@pytest.mark.usefixtures("debugging")
def test_a_refinement_that_breaks_a_graph_is_named(
    conv_graph: fx.GraphModule,
    images: list[Tensor],
    calibrated: Callable[..., fx.GraphModule],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(graph: fx.GraphModule, batches: object, *, units: object) -> list:
        quantizer = graph.get_submodule("quantizers.weight_fc_weight")
        assert isinstance(quantizer, WeightQuantizer)
        quantizer.set_scale(quantizer.formats[0], torch.zeros(5))
        return []

    from fxmpq.refinement.methods import METHODS, Method

    monkeypatch.setitem(METHODS, "broken", Method(broken))
    graph = calibrated(conv_graph, images)
    groups = require(graph, stage="calibrated").groups
    plan = {group.name: str(group.candidates[0]) for group in groups}
    with pytest.raises(LegalityError, match="after the step 'refine, method broken' .* 'scales'"):
        fxmpq.refine(graph, plan, images, method="broken", progress=False)


@pytest.mark.usefixtures("debugging")
def test_a_legal_graph_passes_through(conv_graph: fx.GraphModule) -> None:
    graph = copy_graph(conv_graph)
    assert checked(graph, "mine") is graph
    assert state_of(graph) is state_of(conv_graph)
    with pytest.raises(LegalityError, match="after the step 'mine'"):
        checked(graph, "mine", "calibrated")


def test_it_is_read_in_one_place() -> None:
    folder = Path(fxmpq.__file__).parent
    readers = [path for path in folder.rglob("*.py") if VARIABLE in path.read_text("utf-8")]
    assert readers == [folder / "graph/debug.py"]


def test_the_environment_of_a_process_switches_it() -> None:
    code = "from fxmpq.graph.debug import is_debugging; print(is_debugging())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={VARIABLE: "1", "PYTHONPATH": str(Path(fxmpq.__file__).parent.parent)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "True"
