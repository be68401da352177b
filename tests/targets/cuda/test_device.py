from __future__ import annotations

import pytest
import torch

from fxmpq.targets.cuda.device import DeviceFacts, device_facts


def test_a_cpu_has_no_capability() -> None:
    assert device_facts(torch.device("cpu")) == DeviceFacts("cpu")


def test_a_gpu_is_asked_for_its_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def capability(device: torch.device) -> tuple[int, int]:
        asked.append(device)
        return (9, 0)

    monkeypatch.setattr(torch.cuda, "get_device_capability", capability)
    device = torch.device("cuda", 1)
    assert device_facts(device) == DeviceFacts("cuda", (9, 0))
    assert asked == [device]


@pytest.mark.parametrize(
    ("capability", "reaches"), [((7, 5), False), ((8, 6), False), ((8, 9), True), ((10, 0), True)]
)
def test_capabilities_are_compared_in_order(capability: tuple[int, int], reaches: bool) -> None:
    assert DeviceFacts("cuda", capability).reaches((8, 9)) is reaches


def test_only_gpus_have_to_reach_a_capability() -> None:
    assert DeviceFacts("cpu").reaches((8, 9))
    assert not DeviceFacts("cuda").reaches((8, 9))
