"""Ranges that are found at run time, through every step."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fxmpq
from fxmpq.calibration.calibrate import calibrate
from fxmpq.calibration.observe import Observations
from fxmpq.errors import PrecisionError
from fxmpq.graph.state import state_of
from fxmpq.quantizers.dynamic import fake_quantize_dynamic
from fxmpq.quantizers.modules import ActivationQuantizer
from fxmpq.storage.load import load
from fxmpq.storage.save import save
from fxmpq.training.freeze import freeze
from fxmpq.training.planned import trainable_plan

NAMES = ["w4a8d", "w8a8", "w8a8dt"]


class Branches(nn.Module):
    """Two layers that read one tensor, and one that reads what both make of it."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.left(x)) * self.right(x))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return Branches()


@pytest.fixture(scope="module")
def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(5, 4, 6, generator=generator) for _ in range(2)]


@pytest.fixture(scope="module")
def graph(model: nn.Module, batches: list[Tensor]) -> fx.GraphModule:
    traced = fxmpq.trace(model, batches[0])
    prepared = fxmpq.prepare(traced, "reference", candidates=NAMES)
    return calibrate(prepared, batches, progress=False)


def planned(graph: fx.GraphModule, *names: str) -> fx.GraphModule:
    groups = [group.name for group in state_of(graph).groups]
    return fxmpq.apply(graph, dict(zip(groups, names, strict=True)))


def quantizers(graph: fx.GraphModule) -> list[ActivationQuantizer]:
    return [module for module in graph.modules() if isinstance(module, ActivationQuantizer)]


@pytest.mark.parametrize(
    ("names", "bias_correction", "passes"),
    [
        (["w4a8d", "w8a8dt"], False, 0),
        (["w4a8d", "w8"], False, 0),
        (["w4a8d"], True, 1),
        (["w4a8d", "w4a8"], False, 1),
    ],
)
def test_no_data_is_passed_where_nothing_is_to_be_found(
    model: nn.Module,
    batches: list[Tensor],
    names: list[str],
    bias_correction: bool,
    passes: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runs: list[object] = []
    observe = Observations.observe

    def counted(self: Observations, batches: Iterable[Any]) -> None:
        runs.append(batches)
        observe(self, batches)

    monkeypatch.setattr(Observations, "observe", counted)
    prepared = fxmpq.prepare(fxmpq.trace(model, batches[0]), "reference", candidates=names)
    made = calibrate(prepared, batches, bias_correction=bias_correction, progress=False)
    assert len(runs) == passes
    has_static = "w4a8" in names
    assert all(
        set(entry.ranges) == ({"uint8"} if has_static else set()) for entry in quantizers(made)
    )


def test_the_simulation_finds_a_range_on_each_batch(
    graph: fx.GraphModule, model: nn.Module, batches: list[Tensor]
) -> None:
    made = planned(graph, "w4a8d", "w8a8dt")
    seen: list[Tensor] = []
    first = quantizers(made)[0]
    assert first.active is not None
    handle = first.register_forward_hook(lambda _, __, out: seen.append(out))
    for scale in (1.0, 50.0):
        x = batches[0] * scale
        made(x)
        assert torch.equal(seen[-1], fake_quantize_dynamic(x, first.active))
    handle.remove()
    # A calibrated range would clip most of what is fifty times as large.
    with torch.no_grad():
        wide, expected = made(batches[0] * 50), model(batches[0] * 50)
        clipped = planned(graph, "w8a8", "w8a8")(batches[0] * 50)
    assert float((wide - expected).square().sum() / expected.square().sum()) < 0.05
    assert float((clipped - expected).square().sum() / expected.square().sum()) > 0.5


def test_the_reference_has_no_scale_for_it(
    graph: fx.GraphModule, batches: list[Tensor], tmp_path: Path
) -> None:
    made = planned(graph, "w8a8dt", "w8a8")
    converted = fxmpq.convert(made, "reference", output=tmp_path)
    assert torch.equal(converted.run(batches[1])[0], made(batches[1]))
    entries = list(json.loads((tmp_path / "model.json").read_text())["activations"].values())
    assert entries[0] == {
        "format": "uint8dt",
        "numbers": "affine",
        "bits": 8,
        "scale": None,
        "zero_point": None,
    }
    assert entries[1]["scale"] > 0


def test_a_stored_graph_comes_back(
    graph: fx.GraphModule, batches: list[Tensor], tmp_path: Path
) -> None:
    for index, made in enumerate((graph, planned(graph, "w4a8d", "w8a8dt"))):
        again = load(save(made, tmp_path / str(index)))
        assert torch.equal(again(batches[1]), made(batches[1]))
        assert state_of(again).choices == state_of(made).choices
        assert [entry.formats for entry in quantizers(again)] == [
            entry.formats for entry in quantizers(made)
        ]


@pytest.mark.parametrize("method", ["projected", "sqnr", "hessian"])
def test_candidates_are_measured_beside_the_others(
    graph: fx.GraphModule, batches: list[Tensor], method: str
) -> None:
    options: dict[str, object] = {}
    if method == "hessian":
        options = {"loss": lambda made, batch: made(batch).square().mean(), "activations": True}
    values = fxmpq.measure(graph, batches, method=method, progress=False, **options).values
    assert all(list(row) == NAMES for row in values.values())
    for row in values.values():
        assert row["w4a8d"] > row["w8a8dt"] != row["w8a8"]


def test_it_costs_what_a_calibrated_range_costs(graph: fx.GraphModule) -> None:
    for rows in fxmpq.cost(graph).costs.values():
        assert all(row["w8a8dt"] == row["w8a8"] >= row["w4a8d"] for row in rows.values())


def test_training_learns_weights_on_ranges_of_each_run(
    graph: fx.GraphModule, batches: list[Tensor]
) -> None:
    made = planned(graph, "w4a8d", "w8a8")
    learning = trainable_plan(made).train()
    assert torch.equal(learning(batches[0]), made(batches[0]))
    optimizer = torch.optim.SGD(learning.parameters(), lr=0.05)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = (learning(batches[0]) - 0.3).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 1.2
    before = [dict(entry.ranges) for entry in quantizers(made)]
    freeze(learning, made)
    assert torch.equal(learning(batches[1]), made(batches[1]))
    assert quantizers(made)[0].ranges == before[0]
    assert quantizers(made)[1].ranges != before[1]


@pytest.mark.parametrize("method", ["gptq", "adaround", "bias_correction"])
def test_methods_of_weights_work_on_it(
    graph: fx.GraphModule, batches: list[Tensor], method: str
) -> None:
    made = planned(graph, "w4a8d", "w8a8dt")
    options = {"steps": 20} if method == "adaround" else {}
    plan = state_of(made).choices
    refined = fxmpq.refine(made, plan, batches, method=method, progress=False, **options)
    assert [entry.ranges for entry in quantizers(refined)] == [
        entry.ranges for entry in quantizers(made)
    ]
    assert refined(batches[0]).isfinite().all()
    assert not torch.equal(refined(batches[0]), made(batches[0]))


@pytest.mark.parametrize(
    ("target", "name"), [("onnxruntime", "w8a8dt"), ("onnxruntime", "w8a4d"), ("openvino", "w8a8d")]
)
def test_targets_without_it_refuse_it(
    model: nn.Module, batches: list[Tensor], target: str, name: str
) -> None:
    traced = fxmpq.trace(model, batches[0])
    with pytest.raises(PrecisionError, match=f"cannot run {name}; it runs"):
        fxmpq.prepare(traced, target, candidates=[name])


def test_convolutions_need_another_candidate() -> None:
    x = torch.ones(1, 3, 6, 6)
    traced = fxmpq.trace(nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(32, 2)), x)
    with pytest.raises(PrecisionError, match="no candidate among w8a8d runs on layer '0' .conv."):
        fxmpq.prepare(traced, "onnxruntime", candidates=["w8a8d"])
    prepared = fxmpq.prepare(traced, "onnxruntime", candidates=["w8a8", "w8a8d"])
    found = [[str(entry) for entry in group.candidates] for group in state_of(prepared).groups]
    assert found == [["w8a8"], ["w8a8", "w8a8d"]]
