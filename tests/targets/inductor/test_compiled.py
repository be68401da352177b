from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor
from torch._inductor import config

from fxmpq.targets.inductor.compiled import CompiledGraph
from fxmpq.targets.target import Converted


@pytest.fixture
def compiled(made: Converted) -> CompiledGraph:
    assert isinstance(made.module, CompiledGraph)
    return made.module


def test_options_are_set_for_the_call_alone(
    compiled: CompiledGraph, images: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, object] = {}

    def look(*inputs: object) -> list[Tensor]:
        elsewhere = threading.Thread(target=lambda: seen.update(elsewhere=config.freezing))
        elsewhere.start()
        elsewhere.join()
        seen.update(freezing=config.freezing, grad=torch.is_grad_enabled())
        return []

    before = config.get_config_copy()
    monkeypatch.setattr(compiled, "_compiled", look)
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


def test_sizes_are_free_once_two_were_seen(compiled: CompiledGraph, images: list[Tensor]) -> None:
    compiled([images[0]])
    with torch.compiler.set_stance("fail_on_recompile"):
        for samples in (2, 5, 13):
            batch = images[0][:1].expand(samples, -1, -1, -1)
            assert len(compiled([batch])[0]) == samples
