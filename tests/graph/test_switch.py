from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx

from fxmpq.errors import FxmpqError, PlanError
from fxmpq.formats import Precision
from fxmpq.graph.run import run_batch
from fxmpq.graph.state import copy_graph, require
from fxmpq.graph.switch import switch_group, with_choices, without_choices


@pytest.fixture(scope="module")
def graph(
    calibrated: Callable[..., fx.GraphModule], conv_graph: fx.GraphModule, images: list[Tensor]
) -> fx.GraphModule:
    return calibrated(conv_graph, images)


def all_at(graph: fx.GraphModule, precision: str) -> dict[str, str]:
    return {group.name: precision for group in require(graph, stage="calibrated").groups}


def logits(graph: fx.GraphModule, batch: Tensor) -> Tensor:
    (found,) = run_batch(graph, batch)
    assert isinstance(found, Tensor)
    return found


def test_choices_are_simulated_on_a_copy(graph: fx.GraphModule, images: list[Tensor]) -> None:
    before = logits(graph, images[0])
    switched = with_choices(graph, all_at(graph, "w2a8"))
    assert not logits(switched, images[0]).equal(before)
    assert logits(graph, images[0]).equal(before)
    assert require(switched, stage="calibrated").choices == all_at(graph, "w2a8")
    assert require(graph, stage="calibrated").choices == {}


def test_more_bits_are_closer_to_float(graph: fx.GraphModule, images: list[Tensor]) -> None:
    exact = logits(graph, images[1])
    noise = [
        float((logits(with_choices(graph, all_at(graph, name)), images[1]) - exact).square().sum())
        for name in ("w2a8", "w4a8", "w8a8")
    ]
    assert noise[0] > 3 * noise[1] > 9 * noise[2] > 0


def test_a_group_is_switched_on_and_off_again(graph: fx.GraphModule, images: list[Tensor]) -> None:
    copied = copy_graph(graph)
    exact = logits(copied, images[0])
    for group in require(copied, stage="calibrated").groups:
        switch_group(copied, group, group.candidates[0])
        assert not torch.equal(logits(copied, images[0]), exact)
        switch_group(copied, group, Precision())
        assert torch.equal(logits(copied, images[0]), exact)


def test_choices_are_taken_back_on_a_copy(graph: fx.GraphModule, images: list[Tensor]) -> None:
    switched = with_choices(graph, all_at(graph, "w2a8"))
    before = logits(switched, images[0])
    again = without_choices(switched)
    assert logits(again, images[0]).equal(logits(graph, images[0]))
    assert require(again, stage="calibrated") == require(graph, stage="calibrated")
    assert logits(switched, images[0]).equal(before)


def test_unknown_and_missing_groups_are_errors(graph: fx.GraphModule) -> None:
    choices = all_at(graph, "w8a8")
    with pytest.raises(PlanError, match="'conv3', which is no group of this graph; closest:"):
        with_choices(graph, {**choices, "conv3": "w8a8"})
    del choices["fc"]
    with pytest.raises(PlanError, match="no precision for 1 groups: 'fc'"):
        with_choices(graph, choices)


def test_a_precision_that_is_no_candidate_is_an_error(graph: fx.GraphModule) -> None:
    with pytest.raises(FxmpqError, match="has no candidate w5a8; it has w2a8, w3a8"):
        with_choices(graph, all_at(graph, "w5a8"))


def test_an_uncalibrated_graph_is_an_error(conv_graph: fx.GraphModule) -> None:
    with pytest.raises(FxmpqError, match="fxmpq.prepare"):
        with_choices(conv_graph, {})
    with pytest.raises(FxmpqError, match="fxmpq.prepare"):
        without_choices(conv_graph)
