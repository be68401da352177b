from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, fx, nn

from fxmpq.errors import FxmpqError
from fxmpq.formats import NumberFormat
from fxmpq.graph.state import Refinement, copy_graph
from fxmpq.quantizers.second_order import Grid, Quadratic
from fxmpq.refinement import adaround as module
from fxmpq.refinement.adaround import Schedule, adaround, learned_codes
from fxmpq.refinement.gptq import gptq
from fxmpq.refinement.rounding import RoundingProblem
from fxmpq.refinement.units import Units


def run(
    planned: fx.GraphModule, batches: Sequence, **options: float
) -> tuple[fx.GraphModule, list[Refinement]]:
    graph = copy_graph(planned)
    with torch.no_grad():
        return graph, adaround(graph, batches, units=Units(), **options)


def problem(seed: int) -> RoundingProblem:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    u = draw(1, 60, 8) @ draw(1, 8, 8)
    second = u.mT @ u / 60
    weight = draw(1, 5, 8)
    grid = Grid(torch.full((1, 5, 1), 0.6, dtype=torch.float64), -4, 3)
    form = Quadratic(second, torch.zeros_like(weight))
    return RoundingProblem(form, weight, grid.nearest(weight), grid, NumberFormat(3), False)


def errors(found: RoundingProblem, codes: Tensor) -> Tensor:
    return found.form.values(codes * found.grid.scale - found.weight)


def test_learned_codes_beat_the_nearest_and_are_neighbours_of_the_weight() -> None:
    total = learned = 0.0
    for seed in range(5):
        found = problem(seed)
        *_, last = learned_codes(found, Schedule(300, 0.03, 0.01, 0.2))
        total += float(errors(found, found.codes).sum())
        learned += float(errors(found, last).sum())
        exact = (found.weight / found.grid.scale).clamp(-4, 3)
        assert ((last - exact).abs() <= 1).all()
        assert torch.equal(last, last.round())
    assert learned < 0.6 * total


def test_codes_come_every_fifty_steps_and_in_the_end() -> None:
    assert len(list(learned_codes(problem(0), Schedule(120, 0.01, 0.01, 0.2)))) == 3
    assert len(list(learned_codes(problem(0), Schedule(100, 0.01, 0.01, 0.2)))) == 2
    assert len(list(learned_codes(problem(0), Schedule(1, 0.01, 0.01, 0.2)))) == 1


def test_the_penalty_s_exponent_falls_from_20_to_2_behind_the_warm_up() -> None:
    schedule = Schedule(100, 0.01, 0.01, 0.2)
    assert schedule.beta(19) is None
    assert schedule.beta(20) == 20
    assert schedule.beta(60) == pytest.approx(11)
    assert schedule.beta(99) == pytest.approx(2.0, abs=0.3)


def test_inputs_that_never_vary_leave_the_codes() -> None:
    found = problem(1)
    form = Quadratic(0 * found.form.second, 0 * found.form.cross)
    still = replace(found, form=form)
    *_, last = learned_codes(still, Schedule(20, 0.01, 1e-9, 0.99))
    assert torch.isfinite(last).all()


def planted(plan_of: Callable[..., object]) -> object:
    """A layer whose inputs are not correlated, so that nothing beats rounding to nearest."""
    torch.manual_seed(5)
    signs = torch.cartesian_prod(*[torch.tensor([1.0, -1.0])] * 6)
    return plan_of(nn.Sequential(nn.Linear(6, 4)), [signs], ("w3a8",))


def test_a_layer_where_plain_adaround_is_worse_keeps_its_rounding(
    plan_of: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A penalty from the first step on, far too strong, holds what a wild step has thrown about."""
    subject, wild = planted(plan_of), {"steps": 4, "rate": 30.0, "penalty": 50.0, "warmup": 0.0}
    plain: list[float] = []

    def watch(found: RoundingProblem, schedule: Schedule) -> Iterator[Tensor]:
        *_, last = learned_codes(found, schedule)
        plain.append(float(errors(found, last).sum() / errors(found, found.codes).sum()))
        yield last

    monkeypatch.setattr(module, "learned_codes", watch)
    graph, (found,) = run(subject.planned, subject.batches, **wild)
    assert plain[0] > 1.2
    assert found.after <= found.before * (1 + 1e-9)
    x = subject.batches[0]
    assert torch.allclose(graph(x), subject.planned(x), atol=1e-5)


@pytest.mark.parametrize("name", ["conv", "bert", "two_inputs"])
def test_every_layer_gets_better(name: str, subject_of: Callable[[str], object]) -> None:
    subject = subject_of(name)
    _, found = run(subject.planned, subject.batches, steps=100, rate=0.05)
    assert all(entry.after <= entry.before * (1 + 1e-9) for entry in found)
    assert {entry.method for entry in found} == {"adaround"}
    assert sum(entry.after for entry in found) < 0.9 * sum(entry.before for entry in found)


def test_after_gptq_it_is_never_worse(subject_of: Callable[[str], object]) -> None:
    subject = subject_of("conv")
    graph = copy_graph(subject.planned)
    with torch.no_grad():
        first = gptq(graph, subject.batches, units=Units(), sweeps=0)
    _, then = run(graph, subject.batches, steps=60)
    assert then[0].before == pytest.approx(first[0].after, rel=1e-6)
    assert all(entry.after <= entry.before * (1 + 1e-9) for entry in then)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be at least 1; found 0"),
        ({"rate": 0.0}, "rate must be a finite number above 0; found 0.0"),
        ({"penalty": float("inf")}, "penalty must be a finite number above 0; found inf"),
        ({"warmup": 1.0}, r"warmup must be a share of the steps in \[0, 1\); found 1.0"),
    ],
)
def test_bad_options_are_refused_before_any_work(options: dict[str, float], message: str) -> None:
    with pytest.raises(FxmpqError, match=message):
        adaround(fx.GraphModule({}, fx.Graph()), [], units=Units(), **options)
