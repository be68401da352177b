from __future__ import annotations

import dataclasses
import threading

import pytest
import torch
from torch import Tensor, fx
from torch._inductor import config

from fxmpq.targets.inductor.compiled import SIZES_COMPILED_FOR, CompiledGraph
from fxmpq.targets.inductor.program import inductor_program
from fxmpq.targets.target import Converted


@pytest.fixture
def compiled(made: Converted) -> CompiledGraph:
    assert isinstance(made.module, CompiledGraph)
    return made.module


def test_options_are_set_for_the_call_alone(
    planned: fx.GraphModule, images: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = CompiledGraph(inductor_program(planned))
    seen: dict[str, object] = {}

    def look(*inputs: object) -> list[Tensor]:
        elsewhere = threading.Thread(target=lambda: seen.update(elsewhere=config.freezing))
        elsewhere.start()
        elsewhere.join()
        seen.update(freezing=config.freezing, grad=torch.is_grad_enabled())
        return []

    before = config.get_config_copy()
    monkeypatch.setattr(compiled, "_fixed", look)
    assert compiled([images[0]]) == []
    assert seen == {"freezing": True, "grad": False, "elsewhere": False}
    assert config.get_config_copy() == before
    assert torch.is_grad_enabled()


def test_tensors_come_and_go_flat_whatever_their_kind(
    compiled: CompiledGraph, images: list[Tensor]
) -> None:
    with torch.compiler.set_stance("fail_on_recompile"):
        (first,) = compiled([images[0].clone().requires_grad_()])
        with torch.inference_mode():
            (second,) = compiled([images[0].clone()])
    assert torch.equal(first, second)
    assert not first.requires_grad
    assert first.shape == (len(images[0]), 5)


@pytest.mark.parametrize("is_pointwise", [True, False])
def test_the_first_sizes_of_pointwise_convolutions_are_compiled_for(
    planned: fx.GraphModule, monkeypatch: pytest.MonkeyPatch, *, is_pointwise: bool
) -> None:
    program = dataclasses.replace(inductor_program(planned), is_pointwise=is_pointwise)
    compiled = CompiledGraph(program)
    runs: list[str] = []
    monkeypatch.setattr(compiled, "_fixed", lambda *_: runs.append("fixed"))
    monkeypatch.setattr(compiled, "_free", lambda *_: runs.append("free"))
    sizes = (1, 2, 3, 3, 4, 5, 4, 6, 5, 1)
    for samples in sizes:
        compiled([torch.zeros(samples, 3, 16, 16)])
    to_fix = SIZES_COMPILED_FOR if is_pointwise else 0
    assert runs == ["fixed" if samples <= to_fix else "free" for samples in sizes]


def test_sizes_compiled_for_leave_no_trace_in_free_ones(
    planned: fx.GraphModule, images: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fxmpq.targets.inductor.compiled.SIZES_COMPILED_FOR", 1)
    compiled = CompiledGraph(inductor_program(planned))
    whole = compiled([images[0]])[0]
    for samples in (2, 3):
        torch.testing.assert_close(compiled([images[0][:samples]])[0], whole[:samples])
    with torch.compiler.set_stance("fail_on_recompile"):
        for samples in (6, 2, 5, 4):
            torch.testing.assert_close(compiled([images[0][:samples]])[0], whole[:samples])


def test_sizes_are_free_once_more_were_seen_than_are_compiled_for(
    planned: fx.GraphModule, images: list[Tensor]
) -> None:
    program = dataclasses.replace(inductor_program(planned), is_pointwise=False)
    compiled = CompiledGraph(program)
    compiled([images[0]])
    compiled([images[0][:2]])
    with torch.compiler.set_stance("fail_on_recompile"):
        for samples in (2, 5, 13):
            batch = images[0][:1].expand(samples, -1, -1, -1)
            assert len(compiled([batch])[0]) == samples
