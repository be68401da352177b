from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

from fxmpq.errors import TargetError
from fxmpq.graph.batches import Batch
from fxmpq.graph.trace import trace
from fxmpq.targets.convert import convert
from fxmpq.targets.divergence import REQUIRED_AGREEMENT_DB, layer_agreements
from fxmpq.targets.reference import REFERENCE
from fxmpq.targets.target import Converted, LayerValue, Target

Made = Callable[..., fx.GraphModule]


class Difference(nn.Module):
    """Two layers that nearly agree, so that what is lost in one is large in the result."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(8, 8), nn.Linear(8, 8)
        with torch.no_grad():
            for mine, theirs in zip(self.one.parameters(), self.other.parameters(), strict=True):
                theirs.copy_(mine + 0.01 * torch.randn_like(mine))

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) - self.other(x)


X = torch.randn(16, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def planned(calibrated: Made, uniform: Made) -> fx.GraphModule:
    torch.manual_seed(0)
    return uniform(calibrated(trace(Difference(), X), [X], candidates=None), -1)


def target_of(one: float = 1, other: float = 1, output: float = 1, *, tells: bool = True) -> Target:
    """The reference target with its layers' results, and its output, multiplied by factors."""
    factors = {"one": one, "other": other}

    def converter(graph: fx.GraphModule, folder: Path | None) -> Converted:
        made = REFERENCE.convert(graph, folder)
        assert made.layer_values is not None
        exact = made.layer_values

        def values(batch: Batch) -> list[LayerValue]:
            found = exact(batch)
            return [replace(entry, value=entry.value * factors[entry.layer]) for entry in found]

        def run(batch: Batch) -> Sequence[Tensor]:
            mine, theirs = (entry.value for entry in values(batch))
            return [(mine - theirs) * output]

        return replace(made, run=run, layer_values=values if tells else None)

    return replace(REFERENCE, convert=converter)


def refusal(planned: fx.GraphModule, target: Target) -> str:
    with pytest.raises(TargetError) as error:
        convert(planned, target, verify=[X])
    return str(error.value)


def test_rounding_that_later_operators_amplify_is_no_disagreement(
    planned: fx.GraphModule,
) -> None:
    target = target_of(one=1.001)
    made = convert(planned, target, verify=[X])
    assert made.sqnr_db < REQUIRED_AGREEMENT_DB
    found = layer_agreements(planned, made, X)
    assert [entry.layer for entry in found] == ["one", "other", ""]
    assert [entry.sqnr_db for entry in found] == [pytest.approx(60, abs=0.01), math.inf, math.inf]


def test_the_first_layer_that_diverges_is_named(planned: fx.GraphModule) -> None:
    text = refusal(planned, target_of(one=1.1))
    assert "Layer 'one' diverges first: 20.0 dB on the same inputs (no layer comes before" in text
    text = refusal(planned, target_of(one=1.001, other=1.1))
    assert "Layer 'other' diverges first: 20.0 dB on the same inputs (60.0 dB at 'one'" in text
    assert "exclude=['other']" in text
    assert "verify=False" in text
    assert "nan dB on the same inputs" in refusal(planned, target_of(other=math.nan))


def test_what_follows_the_last_layer_is_named(planned: fx.GraphModule) -> None:
    text = refusal(planned, target_of(output=1.1))
    assert "All layers agree; what follows the last of them, 'other', gives 20.0 dB" in text


@pytest.mark.parametrize(("output", "is_refused"), [(1.1, True), (1.0, False)])
def test_what_runs_may_be_no_worse_than_what_shows_its_layers(
    planned: fx.GraphModule, output: float, is_refused: bool
) -> None:
    """Both far from the simulation is amplified rounding; one of them alone is a wrong kernel."""

    def converter(graph: fx.GraphModule, folder: Path | None) -> Converted:
        made = target_of(one=1.001 if output == 1 else 1.0, output=output).convert(graph, folder)
        assert made.layer_values is not None
        shown = made.layer_values

        def values(batch: Batch) -> list[LayerValue]:
            one, other = shown(batch)
            return [one, other, LayerValue("", "", one.value - other.value)]

        return replace(made, layer_values=values)

    target = replace(REFERENCE, convert=converter)
    if is_refused:
        text = refusal(planned, target)
        assert "agrees with the simulation to inf dB SQNR while it shows" in text
        assert "and to 20.0 dB without" in text
    else:
        made = convert(planned, target, verify=[X])
        assert made.sqnr_db < REQUIRED_AGREEMENT_DB


def test_a_target_that_does_not_tell_is_refused_without_a_layer(planned: fx.GraphModule) -> None:
    text = refusal(planned, target_of(one=1.001, tells=False))
    assert "where at least 35 dB are expected. verify=False" in text
    made = target_of(tells=False).convert(planned, None)
    assert layer_agreements(planned, made, X) == ()


def test_the_reference_target_is_exact_layer_by_layer(
    calibrated: Made, uniform: Made, bert_graph: fx.GraphModule, token_batches: list[Batch]
) -> None:
    graph = uniform(calibrated(bert_graph, token_batches))
    made = convert(graph)
    found = layer_agreements(graph, made, token_batches[1])
    assert len(found) == 17 + 1
    assert all(entry.sqnr_db == math.inf for entry in found)


def test_a_value_of_another_shape_is_passed_over(planned: fx.GraphModule) -> None:
    """A runtime that computed a layer together with its readers tells of these."""
    made = convert(planned, REFERENCE, verify=False)
    assert made.layer_values is not None
    exact = made.layer_values

    def values(batch: Batch) -> list[LayerValue]:
        one, other = exact(batch)
        return [replace(one, value=one.value[:, None]), other]

    told = layer_agreements(planned, replace(made, layer_values=values), X)
    assert [entry.layer for entry in told] == ["other", ""]
    assert all(entry.sqnr_db == math.inf for entry in told)
