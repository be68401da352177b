"""What measuring the latency of compiled models takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, fx, nn
from torch._inductor import config

from fxmpq.formats import Precision
from fxmpq.graph.run import run_batch
from fxmpq.graph.state import state_of
from fxmpq.graph.switch import with_choices
from fxmpq.graph.trace import trace
from fxmpq.targets.inductor import INDUCTOR, measured
from fxmpq.targets.inductor.measured import compiler_conditions
from fxmpq.targets.target import agreement_db

Made = Callable[..., fx.GraphModule]


def test_it_is_compiled_for_what_it_runs_on_alone(
    calibrated: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    graph = calibrated(trace(nn.Linear(16, 4), x), [x], "inductor", candidates=[Precision(8, 8)])
    planned = with_choices(graph, dict.fromkeys((g.name for g in state_of(graph).groups), "w8a8"))
    before = state_of(planned), planned.code
    batches: list[tuple[int, ...]] = []

    class Counted(measured.CompiledGraph):
        def __call__(self, inputs: Sequence[object]) -> list[Tensor]:
            batches.extend(tuple(leaf.shape) for leaf in inputs if isinstance(leaf, Tensor))
            return super().__call__(inputs)

    monkeypatch.setattr(measured, "CompiledGraph", Counted)
    assert INDUCTOR.load is not None
    run = INDUCTOR.load(planned)
    assert batches == []
    outputs = run((x[:1],))
    assert batches == [(1, 16)]
    assert isinstance(outputs, list)
    assert agreement_db([run_batch(planned, (x[:1],))[0]], outputs) > 60
    assert (state_of(planned), planned.code) == before


def test_another_compiler_or_other_options_are_other_conditions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert INDUCTOR.conditions is not None
    found = INDUCTOR.conditions()
    assert compiler_conditions() == found
    assert set(found) == {"compiler", "instructions", "options"}
    with config.patch({"epilogue_fusion": False}):
        other = compiler_conditions()
    assert other == {**found, "options": other["options"]} != found
    # As the folders among them, which are not the same everywhere.
    with config.patch({"cuda.arch": "90"}):
        assert compiler_conditions() == found
    monkeypatch.setattr(measured, "get_compiler_version_info", lambda compiler: "version 99")
    other = compiler_conditions()
    assert other == {**found, "compiler": other["compiler"]} != found
