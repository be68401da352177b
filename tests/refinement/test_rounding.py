from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

from fxmpq.formats import NumberFormat
from fxmpq.graph.state import Refinement, copy_graph
from fxmpq.refinement.channel_statistics import channel_statistics
from fxmpq.refinement.rounding import Rounding, RoundingProblem, round_layers
from fxmpq.refinement.units import Units
from fxmpq.refinement.views import LayerView
from fxmpq.refinement.walk import Walk

INT8 = NumberFormat(8)
SUBJECTS = ["conv", "conv_onnxruntime", "bert", "vit", "tied", "two_inputs"]


def nothing(problem: RoundingProblem) -> Iterable[Tensor]:
    return []


def worst(problem: RoundingProblem) -> Iterable[Tensor]:
    return [torch.full_like(problem.codes, problem.grid.low)]


def coin(problem: RoundingProblem) -> Iterable[Tensor]:
    """Codes that are better in some channels: one of each row moved by one."""
    for at in range(problem.weight.shape[2]):
        for move in (-1, 1):
            codes = problem.codes.clone()
            codes[:, :, at] = (codes[:, :, at] + move).clamp(problem.grid.low, problem.grid.high)
            yield codes


def run(
    planned: fx.GraphModule, batches: Sequence, propose: Rounding, units: Units | None = None
) -> tuple[fx.GraphModule, list[Refinement]]:
    graph = copy_graph(planned)
    with torch.no_grad():
        return graph, round_layers("coin", graph, batches, units or Units(), propose)


def views(graph: fx.GraphModule, batches: Sequence) -> list[tuple[LayerView, float]]:
    """Every quantized layer with its error, found from its outputs."""
    return [(view, view.error()) for view in Walk(graph, batches).layers()]


@pytest.mark.parametrize("name", SUBJECTS)
def test_what_is_reported_is_the_error_of_the_outputs(
    name: str, subject_of: Callable[[str], object]
) -> None:
    subject = subject_of(name)
    graph, found = run(subject.planned, subject.batches, coin)
    rounded = [
        (view, error)
        for view, error in views(graph, subject.batches)
        if view.operator.kind != "embedding"
    ]
    assert [entry.layer for entry in found] == [view.layer.name for view, _ in rounded]
    for entry, (_, error) in zip(found, rounded, strict=True):
        assert entry.method == "coin"
        assert entry.after == pytest.approx(error, rel=2e-3, abs=1e-9)
        assert entry.after <= entry.before * (1 + 1e-9)
    assert sum(entry.after for entry in found) < sum(entry.before for entry in found)


def test_the_first_layer_s_error_before_is_that_of_the_plan(
    subject_of: Callable[[str], object],
) -> None:
    subject = subject_of("conv")
    _, found = run(subject.planned, subject.batches, worst)
    _, before = views(subject.planned, subject.batches)[0]
    assert found[0].before == pytest.approx(before, rel=1e-4)


def test_worse_codes_are_not_taken_but_the_bias_is_corrected(
    subject_of: Callable[[str], object],
) -> None:
    subject = subject_of("conv")
    graph, found = run(subject.planned, subject.batches, worst)
    same, expected = run(subject.planned, subject.batches, nothing)
    assert found == expected
    state, other = graph.state_dict(), same.state_dict()
    assert all(torch.equal(state[name], other[name]) for name in state)
    codes = [name for name in state if ".codes_" in name]
    assert len(codes) == len(found)
    for view in Walk(graph, subject.batches).layers():
        plain = subject.planned.get_submodule(view.layer.weight_quantizer)
        assert torch.equal(view.quantized_weight, plain(view.weight))
        total, size = torch.zeros(view.weight.shape[0]), 0
        for batch in range(len(view)):
            miss = view.quantized_output(batch) - view.float_output(batch)
            total += miss.transpose(0, 1).flatten(1).sum(1)
            size += miss[:, 0].numel()
        assert float((total / size).abs().max()) < 1e-5


def test_channels_take_the_best_each_for_itself(subject_of: Callable[[str], object]) -> None:
    subject = subject_of("conv")
    problems: list[RoundingProblem] = []

    def propose(problem: RoundingProblem) -> Iterable[Tensor]:
        problems.append(problem)
        return coin(problem)

    graph, _ = run(subject.planned, subject.batches, propose)
    moved = set()
    for problem, (view, _) in zip(problems, views(graph, subject.batches), strict=True):
        codes = view.quantizer.codes(view.weight, view.number_format).double()
        codes = codes.reshape(problem.codes.shape)
        reached = problem.form.values(codes * problem.grid.scale - problem.weight)
        tried = [
            problem.form.values(other * problem.grid.scale - problem.weight)
            for other in (problem.codes, *coin(problem))
        ]
        assert torch.equal(reached, torch.stack(tried).amin(0))
        moved |= set((codes != problem.codes).any(2).flatten().tolist())
    assert moved == {False, True}


def test_a_shared_weight_is_rounded_once_and_its_other_layers_get_their_biases(
    subject_of: Callable[[str], object],
) -> None:
    subject = subject_of("tied")
    asked = 0

    def propose(problem: RoundingProblem) -> Iterable[Tensor]:
        nonlocal asked
        asked += 1
        return coin(problem)

    graph, found = run(subject.planned, subject.batches, propose)
    assert asked == 1
    assert [entry.layer for entry in found] == ["twice", "twice#2", "embedding#2"]
    assert graph.get_submodule("quantizers.weight_embedding_weight").stored_codes(INT8) is None
    for view in Walk(graph, subject.batches).layers():
        if view.operator.kind == "linear":
            assert float(channel_statistics(view).error_mean.abs().max()) < 1e-5


class ComputedBias(nn.Module):
    """Its second bias depends on the sample, so there is none to correct."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        return nn.functional.linear(x, self.second.weight, self.second.bias * x.mean())


def test_a_computed_bias_stays(plan_of: Callable[..., object]) -> None:
    torch.manual_seed(3)
    batches = [torch.randn(n, 6, generator=torch.Generator().manual_seed(n)) + 1 for n in (9, 4)]
    subject = plan_of(ComputedBias(), batches, ("w2a8",))
    graph, found = run(subject.planned, subject.batches, coin)
    corrected = [view.correction is not None for view, _ in views(graph, batches)]
    assert corrected == [True, False]
    errors = [error for _, error in views(graph, batches)]
    assert [entry.after for entry in found] == pytest.approx(errors, rel=1e-3)
    assert found[1].after <= found[1].before


@pytest.mark.parametrize("precision", ["w3ta8", "w3b4a8", "w2a8"])
def test_scales_per_tensor_block_and_channel(
    precision: str, plan_of: Callable[..., object], conv_graph: fx.GraphModule, images: list[Tensor]
) -> None:
    subject = plan_of(conv_graph, images, (precision,))
    graph, found = run(subject.planned, subject.batches, coin)
    errors = [error for _, error in views(graph, subject.batches)]
    assert [entry.after for entry in found] == pytest.approx(errors, rel=2e-3)
    assert sum(entry.after for entry in found) < sum(entry.before for entry in found)


def test_weights_of_float_format_stay(
    plan_of: Callable[..., object], conv_graph: fx.GraphModule, images: list[Tensor]
) -> None:
    subject = plan_of(conv_graph, images, ("we2m1a8", "w3a8"))
    _, found = run(subject.planned, subject.batches, coin)
    formats = {view.layer.name: view.number_format for view, _ in views(subject.planned, images)}
    assert {entry.layer for entry in found} == {
        name for name, number_format in formats.items() if number_format.is_integer
    }
    assert 0 < len(found) < len(formats)


def test_an_interrupted_run_goes_on_and_ends_with_the_same_bits(
    subject_of: Callable[[str], object], tmp_path: Path
) -> None:
    subject = subject_of("conv")
    whole, expected = run(subject.planned, subject.batches, coin)
    asked = 0

    def interrupted(problem: RoundingProblem) -> Iterable[Tensor]:
        nonlocal asked
        asked += 1
        if asked == 3:
            raise KeyboardInterrupt
        return coin(problem)

    with pytest.raises(KeyboardInterrupt):
        run(subject.planned, subject.batches, interrupted, Units(tmp_path))
    asked = 10
    resumed, found = run(subject.planned, subject.batches, interrupted, Units(tmp_path))
    assert asked == 10 + len(expected) - 2
    assert found == expected
    state, other = whole.state_dict(), resumed.state_dict()
    assert state.keys() == other.keys()
    assert all(torch.equal(state[name], other[name]) for name in state)
