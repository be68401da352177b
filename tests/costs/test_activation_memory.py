from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import fxmpq
from fxmpq.costs.activation_memory import _undominated, activation_memory
from fxmpq.costs.parts import MetricParts
from fxmpq.errors import FxmpqError, InfeasibleBudgetError
from fxmpq.formats import Precision
from fxmpq.graph.prepare import insert_quantizers
from fxmpq.graph.rules import OperatorRule, TargetRules
from fxmpq.graph.state import state_of
from fxmpq.graph.trace import trace
from fxmpq.recipes.models.resnet20 import ResNet20
from fxmpq.targets.executorch import EXECUTORCH
from fxmpq.targets.onnxruntime import ONNXRUNTIME

aten = torch.ops.aten

MICROCONTROLLER = Path(__file__).parents[2] / "docs" / "examples" / "microcontroller.toml"

_WIDTHS = OperatorRule(frozenset({4, 8}), frozenset({2, 4, 8, None}))
PLAIN = TargetRules("plain", {"conv": _WIDTHS, "linear": _WIDTHS}, (Precision(8, 8),))
FUSING = TargetRules(
    "fusing",
    {"conv": _WIDTHS, "linear": _WIDTHS},
    (Precision(8, 8),),
    quantize_outputs_of=frozenset({"conv", "add"}),
    fusions=(("conv", "add", "relu"), ("conv", "relu"), ("add", "relu")),
    through=frozenset({aten.max_pool2d.default}),
)


class Net(nn.Module):
    """A network of random operators on earlier results, with a classifier or without."""

    def __init__(self, steps: list[tuple[str, int, int]], *, returns_middle: bool) -> None:
        super().__init__()
        self.steps, self.returns_middle = steps, returns_middle
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in steps)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        values = [self.convs[0](x)]
        for place, (kind, one, other) in enumerate(self.steps):
            first, second = values[one % len(values)], values[other % len(values)]
            values.append(self.computed(kind, place, first, second))
        middle = (values[len(values) // 2],) if self.returns_middle else ()
        return (self.fc(values[-1].mean((2, 3))), *middle)

    def computed(self, kind: str, place: int, first: Tensor, second: Tensor) -> Tensor:
        operators = {
            "conv": lambda: self.convs[place](first),
            "relu": lambda: torch.relu(first),
            "add": lambda: first + second,
            "pool": lambda: nn.functional.max_pool2d(first, 3, 1, 1),
            "turn": lambda: first.transpose(2, 3),
            "copy": lambda: first.transpose(2, 3).clone(memory_format=torch.contiguous_format),
            "swap": lambda: torch.cat([first[:, 2:], second[:, :2]], dim=1),
        }
        return operators[kind]()


KINDS = ["conv", "conv", "relu", "relu", "add", "pool", "turn", "copy", "swap"]
STEPS = st.lists(
    st.tuples(st.sampled_from(KINDS), st.integers(0, 9), st.integers(0, 9)), min_size=2, max_size=9
)


def peak(found: MetricParts, choices: Mapping[str, str]) -> float:
    return max(moment.total(choices) for moment in found.moments)


def in_turn(graph: fx.GraphModule, start: int = 0) -> dict[str, str]:
    return {
        group.name: str(group.candidates[(start + index) % len(group.candidates)])
        for index, group in enumerate(state_of(graph).groups)
    }


Held = Callable[[fx.GraphModule, Mapping[str, str], TargetRules], int]


def check(held: Held, traced: fx.GraphModule, rules: TargetRules, candidates: list[str]) -> bool:
    """Compare with a machine for a few plans; tells whether all peaks are equal."""
    wanted = [Precision.parse(name) for name in candidates]
    prepared = insert_quantizers(traced, rules, candidates=wanted)
    found = activation_memory(prepared, rules)
    floats = dict.fromkeys((group.name for group in state_of(prepared).groups), "fp32")
    assert found.float_total == held(prepared, floats, rules)
    equal = []
    for start in range(len(candidates)):
        choices = in_turn(prepared, start)
        measured = held(prepared, choices, rules)
        assert peak(found, choices) >= measured
        equal.append(peak(found, choices) == measured)
    return all(equal)


@settings(max_examples=5)
@given(STEPS, st.booleans(), st.sampled_from([PLAIN, FUSING]))
def test_it_is_what_a_machine_holds_that_frees_what_nobody_reads_any_more(
    most_held: Held, steps: list[tuple[str, int, int]], returns_middle: bool, rules: TargetRules
) -> None:
    net = Net(steps, returns_middle=returns_middle).eval()
    traced = trace(net, torch.randn(2, 4, 6, 6))
    assert check(most_held, traced, rules, ["w8a2", "w8a8"])
    # Where a group may be codes or not, it may be an upper bound.
    check(most_held, traced, rules, ["w8", "w8a4", "w8a8"])


@pytest.mark.parametrize("rules", [PLAIN, FUSING, ONNXRUNTIME.rules], ids=lambda rules: rules.name)
def test_residual_networks(most_held: Held, conv_graph: fx.GraphModule, rules: TargetRules) -> None:
    assert check(most_held, conv_graph, rules, ["w4a8", "w8a8"])


def test_resnet20(most_held: Held) -> None:
    traced = trace(ResNet20(num_classes=10).eval(), torch.randn(1, 1, 28, 28))
    assert check(most_held, traced, FUSING, ["w8a4", "w8a8"])
    prepared = insert_quantizers(traced, FUSING, candidates=[Precision(8, 4), Precision(8, 8)])
    found = activation_memory(prepared, FUSING)
    # A block of the first stage: the shortcut, the inner result, and the sum.
    stage = 16 * 28 * 28
    assert found.float_total == 3 * stage * 4
    names = [group.name for group in state_of(prepared).groups]
    assert peak(found, dict.fromkeys(names, "w8a8")) == 3 * stage
    assert peak(found, dict.fromkeys(names, "w8a4")) == 3 * stage // 2


def test_a_chain_of_layers_takes_the_most_that_one_reads_and_writes() -> None:
    sizes = [7, 100, 11, 90, 30, 5]
    layers = [nn.Linear(*pair) for pair in itertools.pairwise(sizes)]
    traced = trace(nn.Sequential(*layers), torch.ones(2, 7))
    prepared = insert_quantizers(traced, PLAIN, candidates=[Precision(8, 2), Precision(8, 8)])
    found = activation_memory(prepared, PLAIN)
    groups = [group.name for group in state_of(prepared).groups]
    for widths in itertools.product([2, 8], repeat=len(groups)):
        stored = [-(-size * bits // 8) for size, bits in zip(sizes, widths, strict=False)] + [5 * 4]
        choices = {name: f"w8a{bits}" for name, bits in zip(groups, widths, strict=True)}
        assert peak(found, choices) == max(map(sum, itertools.pairwise(stored)))
    assert found.float_total == 4 * (90 + 30)


@pytest.mark.parametrize("further", ["fp32", "w8a8dt"])
def test_codes_that_are_read_as_they_are_stored_are_there_once(further: str) -> None:
    traced = trace(nn.Sequential(nn.Linear(4, 50), nn.Linear(50, 60)), torch.ones(2, 4))
    alone, beside = (
        activation_memory(
            insert_quantizers(
                traced, EXECUTORCH.rules, candidates=[Precision.parse(name) for name in names]
            ),
            EXECUTORCH.rules,
        )
        for names in (["w8a8"], ["w8a8", further])
    )
    for found in (alone, beside):
        assert peak(found, {"0": "w8a8", "1": "w8a8"}) == 110
    assert peak(beside, {"0": further, "1": further}) == 4 * 110
    assert peak(beside, {"0": "w8a8", "1": further}) == 50 + 4 * 60


def test_it_is_an_upper_bound_where_codes_are_quantized_once_more(most_held: Held) -> None:
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 300))
    traced = trace(net, torch.randn(2, 1, 6, 6))
    wanted = [Precision(8), Precision(8, 2), Precision(8, 8)]
    prepared = insert_quantizers(traced, FUSING, candidates=wanted)
    found = activation_memory(prepared, FUSING)
    result = 300 * 4
    for choices, held, counted in [
        # The linear layer reads what the convolution stored: codes, or floats.
        ({"0": "w8a8", "3": "w8"}, 128, 128),
        ({"0": "w8", "3": "w8"}, 512, 512),
        # It reads codes of its own; the convolution's are counted on, though nobody reads them.
        ({"0": "w8a8", "3": "w8a2"}, 32, 32 + 128),
    ]:
        assert most_held(prepared, choices, FUSING) == held + result
        assert peak(found, choices) == counted + result
    never_float = insert_quantizers(traced, FUSING, candidates=wanted[1:])
    exact = activation_memory(never_float, FUSING)
    assert peak(exact, {"0": "w8a8", "3": "w8a2"}) == 32 + result


@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 12))
def test_no_moment_that_may_be_the_peak_is_dropped(seed: int, groups: int, rows: int) -> None:
    generator = np.random.default_rng(seed)
    sizes = generator.integers(1, 4, groups)
    starts = np.cumsum([0, 1, *sizes])
    table = generator.integers(0, 6, (rows, starts[-1]))
    kept = _undominated(table, starts[:-1])
    assert kept == sorted(set(kept))
    for choice in itertools.product(*(range(size) for size in sizes)):
        columns = [0, *(start + place for start, place in zip(starts[1:-1], choice, strict=True))]
        totals = table[:, columns].sum(axis=1)
        assert totals.max() == totals[kept].max()


def test_moments_are_few(bert_graph: fx.GraphModule) -> None:
    prepared = insert_quantizers(bert_graph, ONNXRUNTIME.rules)
    found = activation_memory(prepared, ONNXRUNTIME.rules)
    assert len(found.moments) < 12
    choices = in_turn(prepared)
    assert 0 < peak(found, choices) < found.float_total


def test_it_is_a_limit_and_what_is_minimised(conv_net: nn.Module, images: list[Tensor]) -> None:
    options = {"target": MICROCONTROLLER, "progress": False}
    budget = "activation_memory=1500,energy=12%"
    plan = fxmpq.quantize(conv_net, images, budget=budget, **options).plan
    assert plan.costs["activation_memory"] <= 1500
    assert plan.relative["energy"] <= 0.12
    minimum = "minimize=activation_memory,sqnr=10,energy=12%"
    least = fxmpq.quantize(conv_net, images, budget=minimum, **options).plan
    assert least.costs["activation_memory"] < 2816
    with pytest.raises(InfeasibleBudgetError, match="smallest value reachable is 704 .6.25 %"):
        fxmpq.quantize(conv_net, images, budget="activation_memory=700", **options)


def test_an_unprepared_graph_is_an_error(conv_graph: fx.GraphModule) -> None:
    with pytest.raises(FxmpqError, match="fxmpq.prepare"):
        activation_memory(conv_graph, PLAIN)
