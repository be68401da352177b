from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, fx

from fxmpq.formats import NumberFormat, Precision
from fxmpq.graph.legality import calibrated as rules_of_calibrated
from fxmpq.graph.legality.calibrated import (
    ACTIVE,
    CALIBRATED,
    CALIBRATION,
    CHOICES,
    CODES,
    PLANNED,
    RANGES,
    SCALES,
    SHARED_RANGES,
    SHIFTS,
)
from fxmpq.graph.legality.rule import Rule, Subject
from fxmpq.graph.state import copy_graph, state_of, with_state
from fxmpq.quantizers.ranges import ActivationRange

Made = Callable[..., fx.GraphModule]
Plant = Callable[[fx.GraphModule], None]

INT4 = NumberFormat(4)
CANDIDATES = [Precision(4, 8), Precision(8, 8)]
WEIGHT, ACTIVATION, BIAS = (
    f"quantizers.{name}" for name in ("weight_fc_weight", "activation_0", "bias_linear")
)


def change_state(**fields: object) -> Plant:
    def plant(graph: fx.GraphModule) -> None:
        with_state(graph, replace(state_of(graph), **fields))

    return plant


def set_range(scale: float, zero_point: int) -> Plant:
    def plant(graph: fx.GraphModule) -> None:
        quantizer = graph.get_submodule(ACTIVATION)
        quantizer.ranges = {"uint8": ActivationRange(scale, zero_point)}

    return plant


def off_the_middle(graph: fx.GraphModule) -> None:
    set_range(1.0, 127)(graph)
    graph.get_submodule(ACTIVATION).is_symmetric = True


def without_range(graph: fx.GraphModule) -> None:
    graph.get_submodule(ACTIVATION).ranges = {}


def with_dynamic_range(graph: fx.GraphModule) -> None:
    quantizer = graph.get_submodule(ACTIVATION)
    quantizer.formats += (Precision.parse("a8d").activation,)
    quantizer.ranges = {**quantizer.ranges, "uint8d": ActivationRange(1.0, 0)}


def without_scale(graph: fx.GraphModule) -> None:
    del graph.get_submodule(WEIGHT).scale_int4


def set_scale(scale: Tensor) -> Plant:
    def plant(graph: fx.GraphModule) -> None:
        graph.get_submodule(WEIGHT).scale_int4 = scale

    return plant


def set_codes(codes: Tensor) -> Plant:
    def plant(graph: fx.GraphModule) -> None:
        graph.get_submodule(WEIGHT).register_buffer("codes_int4", codes)

    return plant


def set_shift(shift: Tensor) -> Plant:
    def plant(graph: fx.GraphModule) -> None:
        graph.get_submodule(BIAS).set_shift(INT4, shift)

    return plant


def switched_off(graph: fx.GraphModule) -> None:
    graph.get_submodule(WEIGHT).activate(None)


def another_choice(graph: fx.GraphModule) -> None:
    choices = {**state_of(graph).choices, "fc": "w2a8"}
    with_state(graph, replace(state_of(graph), choices=choices))


def lacking_choice(graph: fx.GraphModule) -> None:
    choices = {name: text for name, text in state_of(graph).choices.items() if name != "fc"}
    with_state(graph, replace(state_of(graph), choices={**choices, "nothing": "w4a8"}))


def nan(shape: int) -> Tensor:
    return torch.full((shape,), math.nan)


PLANTS: list[tuple[str, Rule, Plant, str]] = [
    ("not calibrated", CALIBRATION, change_state(calibrated=False), "it is not calibrated"),
    ("no range", RANGES, without_range, "activation_0' lacks a range of uint8"),
    ("a dynamic range", RANGES, with_dynamic_range, "has a range of uint8d, which finds its own"),
    ("a scale of zero", RANGES, set_range(0.0, 0), "has the scale 0.0 for uint8"),
    ("a scale without end", RANGES, set_range(math.inf, 0), "has the scale inf for uint8"),
    ("no number as scale", RANGES, set_range(math.nan, 0), "has the scale nan for uint8"),
    ("a zero outside", RANGES, set_range(1.0, 256), "has its zero outside of uint8"),
    ("a zero off the middle", RANGES, off_the_middle, "is symmetric, with 127 for uint8"),
    (
        "ranges that should be one",
        SHARED_RANGES,
        change_state(shared_ranges=((ACTIVATION, "quantizers.activation_1"),)),
        "quantizers.activation_1 have several ranges of uint8",
    ),
    (
        "a range shared with nothing",
        SHARED_RANGES,
        change_state(shared_ranges=((ACTIVATION, "quantizers.nothing"),)),
        "there is no activation quantizer 'quantizers.nothing' to share a range",
    ),
    ("no scales", SCALES, without_scale, "lacks scale_int4"),
    ("scales of another shape", SCALES, set_scale(torch.ones(3)), r"has scale_int4 of \[3\]"),
    ("a negative scale", SCALES, set_scale(-torch.ones(5)), "scale_int4 that is no scale"),
    ("scales that are no numbers", SCALES, set_scale(nan(5)), "scale_int4 that is no scale"),
    ("codes of another shape", CODES, set_codes(torch.zeros(5, dtype=torch.int8)), "do not fit"),
    ("codes of another kind", CODES, set_codes(torch.zeros(5, 16)), "do not fit its weight"),
    (
        "a code too large",
        CODES,
        set_codes(torch.full((5, 16), 8, dtype=torch.int8)),
        "has a code that int4 has not",
    ),
    ("a shift of another shape", SHIFTS, set_shift(torch.ones(3)), "that is none of 5 channels"),
    ("a shift that is no number", SHIFTS, set_shift(nan(5)), "'fc' has a shift_int4"),
    ("another choice", CHOICES, another_choice, "'fc' has no candidate w2a8"),
    ("a choice less, and one more", CHOICES, lacking_choice, "group 'fc' has no choice"),
    ("a quantizer that is off", ACTIVE, switched_off, "is not at its group's w4a8"),
]


def breaches(rule: Rule, graph: fx.GraphModule) -> list[str]:
    return list(rule.breaches(Subject(graph, state_of(graph))))


@pytest.fixture(scope="module")
def planned(
    conv_graph: fx.GraphModule, images: list[Tensor], calibrated: Made, uniform: Made
) -> fx.GraphModule:
    return uniform(calibrated(conv_graph, images, candidates=CANDIDATES))


@pytest.mark.parametrize(
    ("rule", "plant", "words"), [plant[1:] for plant in PLANTS], ids=[plant[0] for plant in PLANTS]
)
def test_a_planted_breach_is_found(
    rule: Rule, plant: Plant, words: str, planned: fx.GraphModule
) -> None:
    graph = copy_graph(planned)
    assert breaches(rule, graph) == []
    plant(graph)
    found = breaches(rule, graph)
    assert found
    assert re.search(words, found[0]), found


def test_every_rule_has_its_breach() -> None:
    own = {rule.name for rule in vars(rules_of_calibrated).values() if isinstance(rule, Rule)}
    # Shown where a prepared graph is.
    assert {rule.name for _, rule, _, _ in PLANTS} == own - {"all off"}


@pytest.mark.parametrize("model", ["conv", "resnet", "bert"])
def test_calibrated_and_planned_graphs_are_legal_in_every_format(
    model: str, calibrated: Made, uniform: Made, request: pytest.FixtureRequest
) -> None:
    names = {"conv": "images", "resnet": "resnet_batches", "bert": "token_batches"}
    candidates = [Precision.parse(name) for name in ("w4b8a8", "w2ta16", "we4m3ae4m3")]
    graph = calibrated(
        request.getfixturevalue(f"{model}_graph"),
        request.getfixturevalue(names[model]),
        candidates=candidates,
    )
    assert [found for rule in CALIBRATED for found in breaches(rule, graph)] == []
    for index in range(len(candidates)):
        chosen = uniform(graph, index)
        assert [found for rule in PLANNED for found in breaches(rule, chosen)] == []


def test_codes_that_the_format_has_are_legal(planned: fx.GraphModule) -> None:
    graph = copy_graph(planned)
    set_codes(torch.arange(-8, 8, dtype=torch.int8).expand(5, 16))(graph)
    assert breaches(CODES, graph) == []
