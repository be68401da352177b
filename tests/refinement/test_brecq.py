from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from fxmpq.errors import FxmpqError
from fxmpq.graph.state import Refinement, copy_graph, state_of, with_state
from fxmpq.quantizers.modules import ActivationQuantizer, BiasCorrection, WeightQuantizer
from fxmpq.refinement import brecq as module
from fxmpq.refinement.best_seen import BestSeen
from fxmpq.refinement.blocks import find_blocks
from fxmpq.refinement.brecq import brecq
from fxmpq.refinement.fisher import fisher_weights
from fxmpq.refinement.units import Units
from fxmpq.refinement.walk import Walk

from .conftest import draw, state


def run(graph: fx.GraphModule, batches: list, **options: Any) -> list[Refinement]:
    with torch.no_grad():
        return brecq(graph, batches, units=options.pop("units", Units()), **options)


class Residual(nn.Module):
    """Two layers around a skip, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.second(self.first(x).relu()) + x).relu())


def residual(plan_of: Callable[..., Any], *precisions: str) -> Any:
    torch.manual_seed(0)
    # Inputs that go together: rounding one weight up makes good for another rounded down.
    mixing = torch.eye(8) + 0.6
    batches = [draw(24, 8, seed=seed) @ mixing for seed in range(4)]
    return plan_of(Residual(), batches, precisions=precisions)


def test_no_block_gets_worse_and_ranges_outside_stay(subject: Any) -> None:
    graph = copy_graph(subject.planned)
    weights = {name: value.clone() for name, value in graph.named_parameters()}
    done = run(graph, subject.batches, steps=3)
    assert done
    assert all(entry.method == "brecq" and entry.after <= entry.before for entry in done)
    blocks = [view.name for view in Walk(graph, subject.batches).blocks()]
    assert [entry.layer for entry in done] == [name for name in blocks if name in layers(done)]
    assert all(torch.equal(value, weights[name]) for name, value in graph.named_parameters())


def layers(done: list[Refinement]) -> set[str]:
    return {entry.layer for entry in done}


@pytest.mark.parametrize("weighting", ["outputs", "labels", "none"])
def test_errors_are_weighted_as_it_says(plan_of: Callable[..., Any], weighting: str) -> None:
    subject = residual(plan_of, "w3a4")
    graph, batches = subject.planned, subject.batches
    nodes = [block.output for block in find_blocks(graph)]
    is_weighted = weighting != "none"
    how = {"weighting": weighting} if is_weighted else {}
    weights = fisher_weights(graph, batches, nodes, seed=5, **how)
    done = run(graph, batches, steps=20, weighting=weighting, seed=5)
    for entry, view in zip(done, Walk(graph, batches).blocks(), strict=True):
        noise = signal = 0.0
        for batch in range(len(batches)):
            expected = view.float_output(batch)
            factor = weights[view.block.output][batch] if is_weighted else torch.ones(())
            with torch.no_grad():
                noise += float((factor * (view.output(batch) - expected).square()).sum())
            signal += float((factor * expected.square()).sum())
        assert entry.after == pytest.approx(noise / signal, rel=1e-4)
        # A hundred labels, most of them expected, say too little to go by.
        assert entry.after < entry.before or weighting == "labels"


@pytest.mark.parametrize("weighting", ["outputs", "none"])
def test_roundings_alone_take_a_part_of_the_error(
    plan_of: Callable[..., Any], weighting: str
) -> None:
    subject = residual(plan_of, "w2a8")
    graph = subject.planned
    nearest = {name: m.codes(weight(graph, m), m.active) for name, m in weighted(graph)}
    done = run(
        graph, subject.batches, steps=120, weighting=weighting, bias_rate=0.0, range_rate=0.0
    )
    assert done[0].after < 0.9 * done[0].before
    for name, m in weighted(graph):
        exact = weight(graph, m) / m.spread_scale(weight(graph, m), m.active)
        inside = (exact > -2) & (exact < 1)
        codes = m.codes(weight(graph, m), m.active)
        assert (codes - exact).abs()[inside].max() < 1
        assert (codes - nearest[name]).abs().max() <= 1
    assert any(
        not torch.equal(m.codes(weight(graph, m), m.active), nearest[name])
        for name, m in weighted(graph)
    )


def weighted(graph: fx.GraphModule) -> list[tuple[str, WeightQuantizer]]:
    return [(name, m) for name, m in graph.named_modules() if isinstance(m, WeightQuantizer)]


def weight(graph: fx.GraphModule, quantizer: WeightQuantizer) -> Tensor:
    return graph.get_parameter(quantizer.name).detach()


def test_a_block_that_training_would_worsen_stays_bit_for_bit(
    plan_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = residual(plan_of, "w4a8")
    graph = subject.planned
    for _, m in weighted(graph):
        # Weights that lie on the grid but for a hair.
        scale = m.scale(m.active)
        codes = m.codes(weight(graph, m), m.active)
        with torch.no_grad():
            graph.get_parameter(m.name).copy_((codes + 0.01) * scale[:, None])
    for _, m in graph.named_modules():
        if isinstance(m, BiasCorrection) and m.active is not None:
            m.set_shift(m.active, None)
    before = state(graph)
    wild = {"steps": 6, "rounding_rate": 9.0, "bias_rate": 5.0, "range_rate": 2.0}
    done = run(graph, subject.batches, **wild)
    assert all(entry.after == entry.before for entry in done)
    assert state(graph) == before
    monkeypatch.setattr(BestSeen, "restore", lambda self: None)
    run(graph, subject.batches, weighting="none", **wild)
    view = next(iter(Walk(graph, subject.batches).blocks()))
    assert view.error() > 10 * done[0].before


def test_it_starts_from_stored_codes(plan_of: Callable[..., Any]) -> None:
    subject = residual(plan_of, "w3a8")
    graph = subject.planned
    wanted = {}
    for index, (name, m) in enumerate(weighted(graph)):
        near = m.codes(weight(graph, m), m.active).long()
        moved = near + torch.randint(
            -1, 2, near.shape, generator=torch.Generator().manual_seed(index)
        )
        wanted[name] = moved.clamp(-4, 3).to(torch.int8)
        m.set_codes(m.active, wanted[name])
    errors = [view.error() for view in Walk(graph, subject.batches).blocks()]
    done = run(graph, subject.batches, steps=1, weighting="none", rounding_rate=1e-6, bias_rate=0.0)
    assert done[0].before == pytest.approx(errors[0], rel=1e-5)
    for name, m in weighted(graph):
        assert torch.equal(m.codes(weight(graph, m), m.active), wanted[name])


def test_ranges_are_trained_with_all_their_readers(plan_of: Callable[..., Any]) -> None:
    subject = residual(plan_of, "w8a4")
    graph = subject.planned
    found = [(n, m) for n, m in graph.named_modules() if isinstance(m, ActivationQuantizer)]
    for _, m in found:
        m.ranges["uint4"] = replace(m.ranges["uint4"], scale=m.ranges["uint4"].scale / 2)
    before = {name: m.ranges["uint4"] for name, m in found}
    done = run(graph, subject.batches, steps=60, rounding_rate=0.0, bias_rate=0.0, range_rate=0.02)
    assert all(m.ranges["uint4"].scale > before[name].scale for name, m in found)
    assert all(entry.after < entry.before / 1.5 for entry in done)


def test_dynamic_ranges_stay_what_each_run_finds(plan_of: Callable[..., Any]) -> None:
    subject = plan_of(
        nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)), [draw(8, 8)], ("w3a8d", "w3a4d")
    )
    done = run(subject.planned, subject.batches, steps=30)
    assert done
    assert all(entry.after <= entry.before for entry in done)
    modules = subject.planned.modules()
    found = [m for m in modules if isinstance(m, ActivationQuantizer)]
    assert [m.ranges for m in found] == [{}, {}]


def test_tensors_of_one_range_keep_it(plan_of: Callable[..., Any]) -> None:
    subject = residual(plan_of, "w8a4")
    graph = subject.planned
    found = {n: m for n, m in graph.named_modules() if isinstance(m, ActivationQuantizer)}
    shared = tuple(found)[:2]
    with_state(graph, replace(state_of(graph), shared_ranges=(shared,)))
    for m in found.values():
        m.ranges["uint4"] = replace(m.ranges["uint4"], scale=m.ranges["uint4"].scale / 2)
    before = {name: m.ranges["uint4"] for name, m in found.items()}
    run(graph, subject.batches, steps=20, rounding_rate=0.0, bias_rate=0.0, range_rate=0.02)
    changed = {name for name, m in found.items() if m.ranges["uint4"] != before[name]}
    assert changed == set(found) - set(shared)
    assert changed


def test_without_any_weight_on_a_grid_nothing_is_done(plan_of: Callable[..., Any]) -> None:
    subject = residual(plan_of, "we4m3ae4m3")
    before = state(subject.planned)
    assert run(subject.planned, subject.batches, steps=5) == []
    assert state(subject.planned) == before


def test_tied_weights_belong_to_the_first_block(subject_of: Callable[[str], Any]) -> None:
    subject = subject_of("tied")
    graph = copy_graph(subject.planned)
    run(graph, subject.batches, steps=3, rounding_rate=1.0)
    quantizer: Any = graph.get_submodule("quantizers.weight_embedding_weight")
    assert quantizer.stored_codes(quantizer.active) is None


class Passes(nn.Module):
    """Returns, before what its inner model gives, what no layer has a part in."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return 2 * x, self.inner(x)


def test_an_output_that_no_layer_has_a_part_in_weighs_nothing(plan_of: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    batches = [torch.randn(n, 6, generator=torch.Generator().manual_seed(n)) for n in (20, 9)]
    plain, beside = (
        run(plan_of(model, batches, ("w2a8",)).planned, batches, steps=4)
        for model in (inner, Passes(inner))
    )
    assert [(entry.before, entry.after) for entry in beside] == [
        (entry.before, entry.after) for entry in plain
    ]
    assert plain


def test_seeds_give_the_same_bits(subject_of: Callable[[str], Any]) -> None:
    subject = subject_of("conv")
    found = []
    for seed in (0, 0, 1):
        graph = copy_graph(subject.planned)
        run(graph, subject.batches, steps=8, seed=seed, rounding_rate=0.3)
        found.append(state(graph))
    assert found[0] == found[1]
    assert found[0] != found[2]


def test_it_goes_on_from_a_folder(
    subject_of: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = subject_of("conv")
    whole, resumed = copy_graph(subject.planned), copy_graph(subject.planned)
    done = run(whole, subject.batches, steps=8, units=Units(tmp_path), rounding_rate=0.3)
    for name in ("descend", "fisher_weights"):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("computed again"))
    again = run(resumed, subject.batches, steps=8, units=Units(tmp_path), rounding_rate=0.3)
    assert again == done
    assert state(resumed) == state(whole)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"rounding_rate": -1.0}, "rounding_rate must be a finite number from 0 on; found -1"),
        ({"bias_rate": math.inf}, "bias_rate must be"),
        ({"weighting": "fisher"}, "no weighting 'fisher'; there are .*labels"),
        ({"penalty": -0.5}, "penalty must be a finite number from 0 on; found -0.5"),
        ({"penalty": math.nan}, "penalty must be"),
    ],
)
def test_bad_options_are_refused_before_anything_changes(
    subject_of: Callable[[str], Any], options: dict[str, Any], message: str
) -> None:
    subject = subject_of("conv")
    graph = copy_graph(subject.planned)
    before = state(graph)
    with pytest.raises(FxmpqError, match=message):
        run(graph, subject.batches, **options)
    assert state(graph) == before
