from __future__ import annotations

import importlib.util
from collections.abc import Callable

import pytest
import torch

from fxmpq.errors import TargetError
from fxmpq.targets.reference import REFERENCE
from fxmpq.targets.registry import TARGETS, get_target


def test_targets_are_found_by_their_name(monkeypatch: pytest.MonkeyPatch) -> None:
    # One of them refuses CPUs that lack it.
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    for name, target in TARGETS.items():
        assert target.name == name
        assert get_target(name) is target
        assert target.description


def test_a_target_of_ones_own_is_taken_as_it_is() -> None:
    assert get_target(REFERENCE) is REFERENCE


@pytest.mark.parametrize(("name", "nearest"), [("onnx_runtime", "'onnxruntime'"), ("tpu", "'ref")])
def test_an_unknown_target_is_an_error(name: str, nearest: str) -> None:
    with pytest.raises(TargetError, match=f"no target '{name}'; there are .*{nearest}"):
        get_target(name)


@pytest.fixture
def without_onnx(monkeypatch: pytest.MonkeyPatch) -> None:
    find: Callable[..., object] = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "onnxscript" else find(name)
    )


@pytest.mark.usefixtures("without_onnx")
def test_a_missing_package_names_the_extra_that_installs_it() -> None:
    with pytest.raises(
        TargetError,
        match=r"'onnxruntime' needs the package 'onnxscript'.*pip install 'fxmpq\[onnxruntime\]'",
    ):
        get_target("onnxruntime")
    assert get_target("reference") is REFERENCE


@pytest.mark.parametrize("name", ["openvino", "openvino-bf16"])
def test_two_targets_may_need_one_extra(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    with pytest.raises(
        TargetError, match=rf"'{name}' needs the package 'openvino'.*'fxmpq\[openvino\]'"
    ):
        get_target(name)
