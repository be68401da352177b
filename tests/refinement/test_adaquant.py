from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxmpq.errors import FxmpqError
from fxmpq.formats import NumberFormat
from fxmpq.graph.state import copy_graph, require, state_of, with_state
from fxmpq.quantizers.modules import ActivationQuantizer, WeightQuantizer
from fxmpq.refinement import adaquant as module
from fxmpq.refinement.best_seen import BestSeen
from fxmpq.refinement.channel_statistics import channel_statistics
from fxmpq.refinement.units import Units
from fxmpq.refinement.walk import Walk

from .conftest import draw, run_adaquant, state


def test_no_layer_gets_worse_and_every_bias_that_can_be_trained_is(subject: Any) -> None:
    graph = copy_graph(subject.planned)
    weights = {name: value.clone() for name, value in graph.named_parameters()}
    done = run_adaquant(graph, subject.batches, steps=3)
    assert done
    assert all(entry.method == "adaquant" and entry.after <= entry.before for entry in done)
    expected = [
        layer.name
        for group in require(graph, stage="calibrated").groups
        for layer in group.layers
        if layer.bias_correction is not None
        and graph.get_submodule(layer.bias_correction).active is not None
    ]
    assert sorted(entry.layer for entry in done) == sorted(expected)
    assert all(torch.equal(value, weights[name]) for name, value in graph.named_parameters())


def test_embeddings_and_what_is_tied_to_them_stay(subject_of: Callable[[str], Any]) -> None:
    subject = subject_of("tied")
    graph = copy_graph(subject.planned)
    run_adaquant(graph, subject.batches, steps=3)
    quantizer = graph.get_submodule("quantizers.weight_embedding_weight")
    assert isinstance(quantizer, WeightQuantizer)
    assert quantizer.active is not None
    assert quantizer.stored_codes(quantizer.active) is None


class Shared(nn.Module):
    """A layer that is called three times, and one whose bias is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.shared, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for _ in range(3):
            x = x + self.shared(x).relu()
        return nn.functional.linear(x, self.last.weight, self.last.bias * x.mean())


def test_further_calls_get_their_bias_and_a_layer_with_a_computed_one_stays(
    plan_of: Callable[..., Any],
) -> None:
    torch.manual_seed(0)
    subject = plan_of(Shared(), [draw(32, 8), draw(16, 8, seed=1)], precisions=("w2a8",))
    graph = copy_graph(subject.planned)
    done = run_adaquant(graph, subject.batches, steps=60)
    assert [entry.layer for entry in done] == ["first", "shared", "shared#2", "shared#3"]
    for view in Walk(graph, subject.batches).layers():
        if not view.is_first:
            assert float(channel_statistics(view).error_mean.abs().max()) < 1e-5
    name = "quantizers.weight_last_weight"
    assert graph.get_submodule(name).stored_codes(NumberFormat(2)) is None
    assert not torch.equal(graph(draw(4, 8)), subject.planned(draw(4, 8)))


@pytest.mark.parametrize("rate", ["range_rate", "scale_rate", "weight_rate"])
def test_a_rate_that_is_far_too_high_changes_nothing(
    rate: str, plan_of: Callable[..., Any]
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    subject = plan_of(model, [draw(24, 6)], precisions=("w3a8",))
    before = state(subject.planned)
    done = run_adaquant(subject.planned, subject.batches, steps=16, **{rate: 1e6})
    assert all(entry.after == entry.before for entry in done)
    assert state(subject.planned) == before


def test_tensors_of_one_range_keep_it(plan_of: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3))
    subject = plan_of(model, [draw(24, 6)], precisions=("w8a4",))
    graph = subject.planned
    found = {n: m for n, m in graph.named_modules() if isinstance(m, ActivationQuantizer)}
    shared = tuple(found)[:2]
    with_state(graph, replace(state_of(graph), shared_ranges=(shared,)))
    for m in found.values():
        m.ranges["uint4"] = replace(m.ranges["uint4"], scale=m.ranges["uint4"].scale / 2)
    before = {name: m.ranges["uint4"] for name, m in found.items()}
    run_adaquant(graph, subject.batches, steps=40, range_rate=0.02)
    changed = {name for name, m in found.items() if m.ranges["uint4"] != before[name]}
    assert changed == set(found) - set(shared)
    assert changed


def test_it_takes_a_good_part_of_the_error_of_coarse_layers(plan_of: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 8))
    mixing = draw(24, 24, seed=1)
    batches = [draw(32, 24, seed=seed) @ mixing for seed in range(4)]
    subject = plan_of(model, batches, precisions=("w2a8",))
    done = run_adaquant(subject.planned, batches, steps=150)
    assert all(entry.after < 0.85 * entry.before for entry in done)
    for entry, view in zip(done, Walk(subject.planned, batches).layers(), strict=True):
        if not view.node.users or "relu" not in next(iter(view.node.users)).name:
            assert view.error() == pytest.approx(entry.after, rel=1e-4)


def test_codes_alone_come_near_the_best_of_all(plan_of: Callable[..., Any]) -> None:
    model = nn.Linear(4, 1)
    with torch.no_grad():
        # Rounded to nearest all of it is lost, though together it is nearly two steps.
        model.weight.copy_(torch.tensor([[0.45, 0.4, 0.48, 0.42]]))
    mixing = torch.eye(4) + 0.9
    batches = [draw(64, 4, seed=seed) @ mixing for seed in range(2)]
    subject = plan_of(model, batches, precisions=("w2",))
    fixed = {"bias_rate": 0.0, "scale_rate": 0.0, "range_rate": 0.0}
    graph = subject.planned
    view = next(iter(Walk(graph, batches).layers()))
    quantizer, number_format = view.quantizer, view.number_format
    quantizer.set_scale(number_format, torch.ones(1))
    view.set_bias(view.float_bias)
    errors = []
    for codes in itertools.product(range(-2, 2), repeat=4):
        quantizer.set_codes(number_format, torch.tensor([codes]))
        errors.append(view.error())
    quantizer.set_codes(number_format, None)
    nearest = view.error()
    [found] = run_adaquant(graph, batches, steps=100, weight_rate=0.005, **fixed)
    assert found.before == pytest.approx(nearest)
    assert min(errors) < nearest / 10
    assert found.after <= sorted(errors)[3] * 1.0001
    assert quantizer.stored_codes(number_format) is not None


def planted(plan_of: Callable[..., Any]) -> Any:
    """A layer whose weights lie on the grid: every change makes it worse."""
    model = nn.Linear(6, 4, bias=False)
    subject = plan_of(model, [draw(16, 6)], precisions=("w3",))
    [quantizer] = [m for m in subject.planned.modules() if isinstance(m, WeightQuantizer)]
    with torch.no_grad():
        quantizer.set_scale(quantizer.active, torch.full((4,), 0.5))
        model_weight = dict(subject.planned.named_parameters())["weight"]
        codes = torch.randint(-4, 4, (4, 6), generator=torch.Generator().manual_seed(2))
        model_weight.copy_(codes * 0.5 + 0.05)
        for name, buffer in list(subject.planned.named_buffers()):
            if "shift" in name:
                buffer.zero_()
    return subject


def test_a_layer_that_training_would_worsen_stays_bit_for_bit(
    plan_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = planted(plan_of)
    before = state(subject.planned)
    wild = {"steps": 8, "weight_rate": 3.0, "bias_rate": 5.0}
    [found] = run_adaquant(subject.planned, subject.batches, **wild)
    assert found.after == found.before
    after = state(subject.planned)
    assert {name: after[name] for name in before} == before
    monkeypatch.setattr(BestSeen, "restore", lambda self: None)
    run_adaquant(subject.planned, subject.batches, **wild)
    view = next(iter(Walk(subject.planned, subject.batches).layers()))
    assert view.error() > 10 * found.before


def test_seeds_give_the_same_bits(subject_of: Callable[[str], Any]) -> None:
    subject = subject_of("conv")
    found = []
    for seed in (0, 0, 1):
        graph = copy_graph(subject.planned)
        run_adaquant(graph, subject.batches, steps=5, seed=seed, weight_rate=0.1)
        found.append(state(graph))
    assert found[0] == found[1]
    assert found[0] != found[2]


def test_it_goes_on_from_a_folder(
    subject_of: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = subject_of("conv")
    whole, resumed = copy_graph(subject.planned), copy_graph(subject.planned)
    done = run_adaquant(whole, subject.batches, steps=4, units=Units(tmp_path))
    monkeypatch.setattr(module, "descend", lambda *_, **__: pytest.fail("computed again"))
    again = run_adaquant(resumed, subject.batches, steps=4, units=Units(tmp_path))
    assert again == done
    assert state(resumed) == state(whole)


def test_float_formats_are_left_alone(plan_of: Callable[..., Any]) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    batches = [draw(8, 8)]
    graph = plan_of(model, batches, precisions=("we4m3ae4m3", "w4ae4m3")).planned
    before = state(graph)
    done = run_adaquant(graph, batches, steps=10)
    assert [entry.layer for entry in done] == ["2"]
    after = state(graph)
    changed = {name for name in after if before.get(name) != after[name]}
    assert changed
    assert all("weight__2_" in name or "bias_linear_1" in name for name in changed)


def test_dynamic_ranges_stay_what_each_run_finds(plan_of: Callable[..., Any]) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    batches = [draw(8, 8)]
    graph = plan_of(model, batches, precisions=("w3a8d", "w3a4d")).planned
    done = run_adaquant(graph, batches, steps=30)
    assert [entry.layer for entry in done] == ["0", "2"]
    assert all(entry.after <= entry.before for entry in done)
    found = [m for m in graph.modules() if isinstance(m, ActivationQuantizer)]
    assert [m.ranges for m in found] == [{}, {}]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"weight_rate": -1.0}, "weight_rate must be a finite number from 0 on; found -1"),
        ({"range_rate": math.nan}, "range_rate must be"),
    ],
)
def test_bad_options_are_refused_before_anything_changes(
    subject_of: Callable[[str], Any], options: dict[str, Any], message: str
) -> None:
    subject = subject_of("conv")
    graph = copy_graph(subject.planned)
    before = state(graph)
    with pytest.raises(FxmpqError, match=message):
        run_adaquant(graph, subject.batches, **options)
    assert state(graph) == before
