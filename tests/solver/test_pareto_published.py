from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from fxmpq.costs.table import CostTable
from fxmpq.sensitivity.sensitivity import Sensitivity
from fxmpq.solver.exact import exact
from fxmpq.solver.pareto import pareto
from fxmpq.solver.ties import merge_ties

PUBLISHED = json.loads(
    (Path(__file__).parents[1] / "data" / "published.json").read_text(encoding="utf-8")
)["hawq_v3_resnet18"]
LAYERS = PUBLISHED["layer_names"]
TIES = [[LAYERS[index] for index in tie] for tie in PUBLISHED["ties"]]

Tables = tuple[Sensitivity, CostTable]


def published(constraint: str) -> Tables:
    """The published program: the loss of four bits, against eight."""
    inputs = PUBLISHED["inputs"]
    four, eight = {
        "latency": (inputs["latency_int4"], inputs["latency_int8"]),
        "modelsize": ([size / 2 for size in inputs["parameters"]], inputs["parameters"]),
        "bops": (
            [macs / 64 for macs in inputs["millions_of_macs"]],
            [macs / 16 for macs in inputs["millions_of_macs"]],
        ),
    }[constraint]
    gains = [
        trace * (at8 - at4)
        for trace, at8, at4 in zip(
            inputs["Hutchinson_trace"],
            inputs["delta_weights_8bit_square"],
            inputs["delta_weights_4bit_square"],
            strict=True,
        )
    ]
    values = {layer: {"w4a4": 0.0, "w8a8": gain} for layer, gain in zip(LAYERS, gains, strict=True)}
    costs = {
        layer: {"w4a4": low, "w8a8": high}
        for layer, low, high in zip(LAYERS, four, eight, strict=True)
    }
    return Sensitivity(values, "published"), CostTable({constraint: costs})


def integers(tables: Tables, constraint: str, choice: Mapping[str, str]) -> tuple[int, int]:
    """Cost and loss of some groups, in integers."""
    rows = (tables[1].costs[constraint], tables[0].values)
    cost, loss = (
        sum(int(exact(row[group][name]) * 10**24) for group, name in choice.items()) for row in rows
    )
    return cost, loss


@pytest.mark.parametrize("constraint", ["modelsize", "bops", "latency"])
def test_the_front_of_hawqs_enumeration_holds_the_published_plans(constraint: str) -> None:
    tables = published(constraint)
    front = pareto(*tables, constraint, ties=TIES)
    # All 2^16 assignments, as HAWQ-V2 enumerates them, in integers.
    every = [(0, 0)]
    for members in merge_ties(tables[0].values, TIES)[0]:
        steps = [integers(tables, constraint, dict.fromkeys(members, n)) for n in ("w4a4", "w8a8")]
        every = [(cost + step[0], loss + step[1]) for cost, loss in every for step in steps]
    assert len(every) == 2**16
    undominated: list[tuple[int, int]] = []
    for cost, loss in sorted(every):
        if not undominated or loss < undominated[-1][1]:
            undominated.append((cost, loss))
    found = [integers(tables, constraint, plan.choices) for plan in front.plans]
    assert found == undominated
    entries = [entry for entry in PUBLISHED["configurations"] if entry["constraint"] == constraint]
    assert len(entries) == 3
    for entry in entries:
        plan = front.at(entry["limit"])
        assert [int(plan.choices[layer][1]) for layer in LAYERS] == entry["bits"]
        assert plan.loss == pytest.approx(entry["objective"], rel=1e-12)
