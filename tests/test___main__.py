from __future__ import annotations

import runpy
import sys

import pytest

import fxmpq


def test_the_package_runs_as_the_command_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["fxmpq", "--version"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module("fxmpq", run_name="__main__")
    assert not stopped.value.code
    assert fxmpq.__version__ in capsys.readouterr().out
