from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn
from torch._inductor import config

from fxmpq.graph.trace import trace
from fxmpq.targets.inductor.compiled import SIZES_COMPILED_FOR, CompiledGraph
from fxmpq.targets.inductor.program import inductor_program
from fxmpq.targets.target import Converted

Made = Callable[..., fx.GraphModule]


@pytest.fixture
def compiled(made: Converted) -> CompiledGraph:
    assert isinstance(made.module, CompiledGraph)
    return made.module


@pytest.fixture
def pointwise(calibrated: Made, uniform: Made, images: list[Tensor]) -> fx.GraphModule:
    torch.manual_seed(0)
    return uniform(calibrated(trace(nn.Conv2d(3, 4, 1), images[0]), images, "inductor"))


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


def test_sizes_are_free_once_more_were_seen_than_are_compiled_for(
    pointwise: fx.GraphModule, images: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fxmpq.targets.inductor.compiled.SIZES_COMPILED_FOR", 1)
    compiled = CompiledGraph(inductor_program(pointwise))
    whole = compiled([images[0]])[0]
    for samples in (2, 3):
        torch.testing.assert_close(compiled([images[0][:samples]])[0], whole[:samples])
    with torch.compiler.set_stance("fail_on_recompile"):
        for samples in (6, 2, 5, 4):
            torch.testing.assert_close(compiled([images[0][:samples]])[0], whole[:samples])
        larger = compiled([images[0][:1].expand(13, -1, -1, -1)])[0]
    torch.testing.assert_close(larger, whole[:1].expand_as(larger))
