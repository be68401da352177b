from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx

from fxmpq.graph.legality import trainable as rules_of_trainable
from fxmpq.graph.legality.rule import Rule, Subject
from fxmpq.graph.legality.trainable import LEARNED, STEPS, TRAINABLE, TRAINS
from fxmpq.graph.state import copy_graph, state_of
from fxmpq.quantizers.learned import LearnedQuantizer
from fxmpq.quantizers.planned import PlannedQuantizer
from fxmpq.training.planned import trainable_plan
from fxmpq.training.trainable import trainable

Made = Callable[..., fx.GraphModule]
WEIGHT = "quantizers.weight_fc_weight"


@pytest.fixture(scope="module")
def graphs(
    conv_graph: fx.GraphModule, images: list[Tensor], calibrated: Made, uniform: Made
) -> dict[str, fx.GraphModule]:
    graph = calibrated(conv_graph, images)
    return {
        "planned": uniform(graph),
        "trainable": trainable(graph),
        "trainable_plan": trainable_plan(uniform(graph)),
    }


def frozen(graph: fx.GraphModule) -> None:
    graph.fc.bias = torch.nn.Parameter(graph.fc.bias.detach(), requires_grad=False)


def no_step(graph: fx.GraphModule) -> None:
    quantizer = graph.get_submodule(WEIGHT)
    assert isinstance(quantizer, LearnedQuantizer)
    quantizer.steps[quantizer.formats[0].name].data.fill_(0.0)


def no_planned_step(graph: fx.GraphModule) -> None:
    quantizer = graph.get_submodule(WEIGHT)
    assert isinstance(quantizer, PlannedQuantizer)
    quantizer.ratio.data.fill_(-1.0)


PLANTS: list[tuple[str, Rule, Callable[[fx.GraphModule], None], str]] = [
    ("trainable", TRAINS, frozen, "parameter 'fc.bias' gets no gradient"),
    ("trainable", STEPS, no_step, "weight_fc_weight' has a step that is not positive"),
    ("trainable_plan", STEPS, no_planned_step, "weight_fc_weight' has a step that is not positive"),
    ("planned", LEARNED, lambda _: None, "weight_stem_0_weight' is on, and does not learn"),
]


def breaches(rule: Rule, graph: fx.GraphModule) -> list[str]:
    return list(rule.breaches(Subject(graph, state_of(graph))))


@pytest.mark.parametrize(("kind", "rule", "plant", "words"), PLANTS)
def test_a_planted_breach_is_found(
    kind: str, rule: Rule, plant: Callable, words: str, graphs: dict[str, fx.GraphModule]
) -> None:
    graph = copy_graph(graphs[kind])
    if kind in ("trainable", "trainable_plan"):
        # A copy shares its parameters, of which these are changed.
        quantizer = graph.get_submodule(WEIGHT)
        for name, parameter in list(quantizer.named_parameters(recurse=True)):
            owner, _, leaf = name.rpartition(".")
            own = torch.nn.Parameter(parameter.detach().clone())
            setattr(quantizer.get_submodule(owner), leaf, own)
        assert breaches(rule, graph) == []
    plant(graph)
    found = breaches(rule, graph)
    assert any(re.search(words, line) for line in found), found


def test_every_rule_has_its_breach() -> None:
    rules = {rule.name for rule in vars(rules_of_trainable).values() if isinstance(rule, Rule)}
    assert {rule.name for _, rule, _, _ in PLANTS} == rules


@pytest.mark.parametrize("kind", ["trainable", "trainable_plan"])
def test_graphs_that_train_are_legal(kind: str, graphs: dict[str, fx.GraphModule]) -> None:
    assert [found for rule in TRAINABLE for found in breaches(rule, graphs[kind])] == []
