"""Products of two activations, through every step."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

import fxmpq
from fxmpq.formats import Precision
from fxmpq.graph.state import state_of
from fxmpq.refinement.methods import METHODS as REFINEMENTS
from fxmpq.sensitivity.measure import METHODS
from fxmpq.sensitivity.sensitivity import Sensitivity
from fxmpq.targets.target import agreement_db
from fxmpq.training.freeze import freeze
from fxmpq.training.loss import classification_loss
from fxmpq.training.planned import trainable_plan

Made = Callable[..., fx.GraphModule]

PARTS = ("scores", "context")
ON_WEIGHTS = ("entropy", "orthogonality")


class Attention(nn.Module):
    """One attention with a causal mask, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(12, 36)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(x).unflatten(2, (3, 2, 6)).permute(2, 0, 3, 1, 4)
        query, key, value = heads.unbind(0)
        found = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.head(found.transpose(1, 2).flatten(2)).mean(1)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return Attention().eval()


@pytest.fixture(scope="module")
def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(6, 5, 12, generator=generator) * 2 for _ in range(2)]


@pytest.fixture(scope="module")
def labelled(model: nn.Module, batches: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    with torch.no_grad():
        return [(batch, model(batch).argmax(1)) for batch in batches]


@pytest.fixture(scope="module")
def graph(model: nn.Module, batches: list[Tensor], calibrated: Made) -> fx.GraphModule:
    candidates = [Precision(4, 4), Precision(8, 8)]
    return calibrated(fxmpq.trace(model, batches[0]), batches, candidates=candidates, products=True)


@pytest.fixture(scope="module")
def planned(graph: fx.GraphModule) -> fx.GraphModule:
    plan = {"qkv": "w8a8", "scores": "a8", "context": "a4", "head": "w4a4"}
    return fxmpq.apply(graph, plan)


def exact(graph: fx.GraphModule, batches: list[Tensor]) -> Sensitivity:
    return fxmpq.measure(graph, batches, method="sqnr", progress=False)


@pytest.mark.parametrize("method", [name for name in METHODS if name not in ON_WEIGHTS])
def test_every_method_scores_fewer_bits_worse(
    method: str,
    graph: fx.GraphModule,
    batches: list[Tensor],
    labelled: list[tuple[Tensor, Tensor]],
) -> None:
    reads = METHODS[method].labels
    options = {"loss": classification_loss} if reads else {}
    found = fxmpq.measure(
        graph, labelled if reads else batches, method=method, progress=False, **options
    )
    for part in PARTS:
        assert set(found.values[part]) == {"a4", "a8"}
        if method != "finetune":  # its losses are as they fall, after so few steps
            assert found.value(part, "a4") > found.value(part, "a8")


def test_projections_of_products_are_near_what_is_measured(
    graph: fx.GraphModule, batches: list[Tensor]
) -> None:
    # As many probes as outputs make it exact to first order.
    found = fxmpq.measure(graph, batches, method="projected", probes=4, progress=False)
    for part in PARTS:
        expected = exact(graph, batches).value(part, "a8")
        assert found.value(part, "a8") == pytest.approx(expected, rel=0.15)


def test_the_solver_weighs_products_against_layers(
    graph: fx.GraphModule, batches: list[Tensor]
) -> None:
    costs, sensitivity = fxmpq.cost(graph), exact(graph, batches)
    assert all(costs.cost("weights", part, name) == 0 for part in PARTS for name in ("a4", "a8"))
    assert costs.cost("bops", "scores", "a4") == 16 * 2 * 5 * 5 * 6
    most = costs.total("bops", costs.uniform("w8a8"))
    plan = fxmpq.solve(sensitivity, costs, {"bops": 0.7 * most})
    rows = [sensitivity.values[group].items() for group in costs.groups]
    brute = min(
        sum(value for _, value in chosen)
        for chosen in itertools.product(*rows)
        if costs.total("bops", dict(zip(costs.groups, (n for n, _ in chosen), strict=True)))
        <= 0.7 * most
    )
    found = sum(sensitivity.value(group, name) for group, name in plan.choices.items())
    assert found == pytest.approx(brute)


@pytest.mark.parametrize("method", list(REFINEMENTS))
def test_every_refinement_leaves_a_graph_that_converts(
    method: str,
    graph: fx.GraphModule,
    planned: fx.GraphModule,
    batches: list[Tensor],
    labelled: list[tuple[Tensor, Tensor]],
) -> None:
    choices, trains = state_of(planned).choices, REFINEMENTS[method].trains
    options = {"loss": classification_loss, "epochs": 1} if trains else {}
    data = labelled if trains else batches
    refined = fxmpq.refine(graph, choices, data, method=method, progress=False, **options)
    assert state_of(refined).choices == choices
    made = fxmpq.convert(refined)
    assert made.sqnr_db == float("inf")
    assert {row.layer: row.asked for row in made.layers} == choices


def test_rounding_before_a_plan_passes_products_by(
    graph: fx.GraphModule, batches: list[Tensor]
) -> None:
    refined = fxmpq.refine(graph, None, batches, method="gptq", progress=False)
    assert {entry.layer for entry in state_of(refined).refinements} == {"qkv", "head"}


def test_ranges_of_operands_train(planned: fx.GraphModule, batches: list[Tensor]) -> None:
    learning = trainable_plan(planned)
    assert torch.equal(learning(batches[0]), planned(batches[0]))
    learning(batches[0]).square().sum().backward()
    groups = state_of(planned).groups
    names = [name for group in groups if group.products for name in group.activation_quantizers]
    assert len(names) == 4
    for name in names:
        (step,) = learning.get_submodule(name).parameters()
        assert step.grad is not None
        assert step.grad.abs().sum() > 0
        step.data.mul_(1.25)
    frozen = fxmpq.apply(planned, state_of(planned).choices)
    freeze(learning, frozen)
    assert torch.equal(learning(batches[0]), frozen(batches[0]))
    assert not torch.equal(frozen(batches[0]), planned(batches[0]))


def test_a_saved_graph_comes_back_with_its_products(
    planned: fx.GraphModule, batches: list[Tensor], tmp_path: Path
) -> None:
    fxmpq.save(planned, tmp_path)
    loaded = fxmpq.load(tmp_path)
    assert state_of(loaded).groups == state_of(planned).groups
    assert torch.equal(loaded(batches[0]), planned(batches[0]))


def test_attention_of_a_loaded_trace_is_taken_apart(
    model: nn.Module, batches: list[Tensor], tmp_path: Path
) -> None:
    fxmpq.save(fxmpq.trace(model, batches[0]), tmp_path)
    prepared = fxmpq.prepare(fxmpq.load(tmp_path), "reference", products=True)
    assert [group.name for group in state_of(prepared).groups] == ["qkv", *PARTS, "head"]
    with torch.no_grad():
        assert agreement_db([model(batches[1])], [prepared(batches[1])]) >= 100
    again = tmp_path / "prepared"
    fxmpq.save(prepared, again)
    assert torch.equal(fxmpq.load(again)(batches[1]), prepared(batches[1]))


@pytest.mark.parametrize("target", ["reference", "onnxruntime"])
def test_the_whole_way_in_one_call(
    target: str, model: nn.Module, batches: list[Tensor], tmp_path: Path
) -> None:
    found = fxmpq.quantize(
        model,
        batches,
        target=target,
        budget="weights=30%",
        candidates=["w4a8", "w8a8"],
        products=True,
        progress=False,
    )
    assert [found.plan.layers[part] for part in PARTS] == ["a8", "a8"]
    made = found.convert(tmp_path)
    assert made.sqnr_db >= 35
    assert {row.layer: row.asked for row in made.layers}["scores"] == "a8"
