from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, fx, nn

from fxmpq.errors import FxmpqError
from fxmpq.formats import NumberFormat, Precision
from fxmpq.graph.state import Refinement, copy_graph
from fxmpq.refinement.gptq import gptq
from fxmpq.refinement.units import Units
from fxmpq.refinement.walk import Walk


def run(
    planned: fx.GraphModule, batches: Sequence, **options: float
) -> tuple[fx.GraphModule, list[Refinement]]:
    graph = copy_graph(planned)
    with torch.no_grad():
        return graph, gptq(graph, batches, units=Units(), **options)


def correlated(samples: int, size: int, seed: int) -> Tensor:
    """Inputs with few directions of large variance, and a mean."""
    generator = torch.Generator().manual_seed(seed)
    factors = torch.randn(samples, 3, generator=generator)
    mixing = torch.randn(3, size, generator=torch.Generator().manual_seed(99))
    return factors @ mixing + 0.1 * torch.randn(samples, size, generator=generator) + 0.5


@pytest.mark.parametrize("name", ["conv", "bert", "vit", "two_inputs"])
def test_every_layer_gets_better(name: str, subject_of: Callable[[str], object]) -> None:
    subject = subject_of(name)
    graph, found = run(subject.planned, subject.batches)
    assert all(entry.after <= entry.before * (1 + 1e-9) for entry in found)
    assert {entry.method for entry in found} == {"gptq"}
    assert sum(entry.after for entry in found) < 0.8 * sum(entry.before for entry in found)
    with torch.no_grad():
        last = [view.error() for view in Walk(graph, subject.batches).layers()][-1]
    assert found[-1].after == pytest.approx(last, rel=2e-3)


def test_what_is_found_holds_on_samples_that_were_not_seen(plan_of: Callable[..., object]) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))
    subject = plan_of(model, [correlated(64, 16, 2), correlated(30, 16, 3)], ("w3a8",))
    graph, _ = run(subject.planned, subject.batches)
    unseen = correlated(500, 16, 4)
    with torch.no_grad():
        expected = model(unseen)
        before, after = (
            float((one(unseen) - expected).square().mean()) for one in (subject.planned, graph)
        )
    assert after < 0.25 * before


def test_sweeps_lower_the_error_of_plain_gptq(subject_of: Callable[[str], object]) -> None:
    subject = subject_of("conv")
    (_, plain), (_, polished) = (
        run(subject.planned, subject.batches, sweeps=sweeps) for sweeps in (0, 10)
    )
    # The first layer sees the same input in both.
    assert polished[0].after <= plain[0].after
    assert sum(entry.after for entry in polished) < sum(entry.after for entry in plain)


def test_fitted_scales_lower_the_error_at_two_bits(plan_of: Callable[..., object]) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))
    subject = plan_of(model, [correlated(64, 16, 2)], ("w2a8",))
    graph, fitted = run(subject.planned, subject.batches, fits=2)
    same, plain = run(subject.planned, subject.batches, fits=0)
    assert fitted[0].after < 0.95 * plain[0].after
    int2, name = NumberFormat(2), "quantizers.weight__0_weight"
    before = subject.planned.get_submodule(name).scale(int2)
    assert torch.equal(same.get_submodule(name).scale(int2), before)
    assert not torch.equal(graph.get_submodule(name).scale(int2), before)


@pytest.mark.parametrize("precision", ["w3ta8", "w3b8a8"])
def test_scales_of_tensors_and_blocks_stay(precision: str, plan_of: Callable[..., object]) -> None:
    torch.manual_seed(1)
    subject = plan_of(nn.Sequential(nn.Linear(16, 8)), [correlated(64, 16, 2)], (precision,))
    graph, found = run(subject.planned, subject.batches, fits=3)
    wanted = Precision.parse(precision).weight
    name = "quantizers.weight__0_weight"
    expected = subject.planned.get_submodule(name).scale(wanted)
    assert torch.equal(graph.get_submodule(name).scale(wanted), expected)
    assert found[0].after < found[0].before


def test_two_runs_are_the_same_to_the_bit(subject_of: Callable[[str], object]) -> None:
    subject = subject_of("conv")
    (first, found), (second, again) = (run(subject.planned, subject.batches) for _ in range(2))
    assert found == again
    other = second.state_dict()
    assert all(torch.equal(tensor, other[name]) for name, tensor in first.state_dict().items())


def test_a_second_run_keeps_what_is_best(subject_of: Callable[[str], object]) -> None:
    subject = subject_of("conv")
    graph, found = run(subject.planned, subject.batches)
    _, again = run(graph, subject.batches, damping=1.0, sweeps=0)
    assert [entry.before for entry in again] == pytest.approx(
        [entry.after for entry in found], rel=1e-3
    )
    assert all(entry.after <= entry.before * (1 + 1e-9) for entry in again)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"damping": 0.0}, "damping must be a finite number above 0, such as 0.01; found 0.0"),
        ({"damping": float("nan")}, "found nan"),
        ({"sweeps": -1}, "sweeps must be at least 0; found -1"),
    ],
)
def test_bad_options_are_refused_before_any_work(options: dict[str, float], message: str) -> None:
    with pytest.raises(FxmpqError, match=message):
        gptq(fx.GraphModule({}, fx.Graph()), [], units=Units(), **options)


def test_a_damping_that_is_too_small_for_the_data_is_a_clear_error(
    plan_of: Callable[..., object],
) -> None:
    torch.manual_seed(2)
    # Six samples leave most of 40 directions without any variance.
    subject = plan_of(nn.Linear(40, 3), [torch.randn(6, 40)], ("w3a8",))
    run(subject.planned, subject.batches, damping=1e-4)
    with pytest.raises(FxmpqError, match="damping=1e-14 is too little.*0.01 is enough"):
        run(subject.planned, subject.batches, damping=1e-14)
