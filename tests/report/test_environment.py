from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path

import pytest
import torch

import fxmpq
from fxmpq.report.environment import cpu_name, environment, package_version


def test_it_tells_machine_and_versions() -> None:
    found = environment()
    assert found["python"] == platform.python_version()
    assert found["fxmpq"] == fxmpq.__version__
    for package in ("onnxruntime", "openvino"):
        assert found[package] == metadata.version(package)
    assert found["threads"] == str(torch.get_num_threads())
    assert int(found["cores"]) >= 1
    assert all(found.values())


def test_a_package_that_is_not_installed_has_no_version() -> None:
    assert package_version("no-such-package-at-all") is None


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("processor\t: 0\nmodel name\t: A Processor: fast\nmodel name\t: B\n", "A Processor: fast"),
        ("processor\t: 0\nmodel name\t:\n", platform.processor() or platform.machine()),
        (None, platform.processor() or platform.machine()),
    ],
)
def test_the_processor_is_read_from_linux_or_else_from_python(
    tmp_path: Path, text: str | None, name: str
) -> None:
    file = tmp_path / "cpuinfo"
    if text is not None:
        file.write_text(text)
    assert cpu_name(file) == name
