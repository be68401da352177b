"""What decides how fast models run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fxmpq
from fxmpq.costs.latency.runtime import Runtime, cpu_name
from fxmpq.report.latency import use_threads


def test_the_cpu_has_its_makers_name(tmp_path: Path) -> None:
    table = tmp_path / "cpuinfo"
    table.write_text("processor\t: 0\nmodel name\t: Fast 3000: X\nmodel name\t: other\n")
    assert cpu_name(table) == "Fast 3000: X"
    table.write_text("processor\t: 0\n")
    assert cpu_name(table) == cpu_name(tmp_path / "missing") != ""


def test_conditions_name_versions_and_threads() -> None:
    runtime = Runtime("some", lambda graph: print, ("onnxruntime",))
    with use_threads(1):
        one = runtime.conditions()
    with use_threads(2):
        two = runtime.conditions()
        assert runtime.threads() == 2
    assert (one["threads"], two["threads"]) == (1, 2)
    assert {**one, "threads": 2} == two
    assert f"torch {torch.__version__.partition('+')[0]}" in str(one["packages"])
    assert "onnxruntime 1" in str(one["packages"])
    assert f"fxmpq {fxmpq.__version__}" in str(one["packages"])


def test_a_target_tells_more_and_knows_its_threads_best() -> None:
    plain = Runtime("some", lambda graph: print, ()).conditions()
    told = Runtime("some", lambda graph: print, (), lambda: {"compiler": "a", "threads": 7})
    assert told.conditions() == {**plain, "compiler": "a", "threads": 7}
    assert told.threads() == 7


def test_a_version_is_the_modules_whatever_distribution_brought_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "quickrun.py").write_text("__version__ = '7.1+gpu'\n")
    monkeypatch.syspath_prepend(tmp_path)
    found = Runtime("some", lambda graph: print, ("quickrun",)).conditions()
    assert str(found["packages"]).startswith("quickrun 7.1+gpu, torch ")
