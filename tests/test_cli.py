from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import fxmpq
from fxmpq.cli import main
from fxmpq.errors import FxmpqError
from fxmpq.recipes import run as run_module
from fxmpq.recipes.schema import Recipe


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Call the command line in this process; returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["fxmpq", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    return int(stopped.value.code or 0)


@pytest.fixture
def recipes(monkeypatch: pytest.MonkeyPatch) -> list[Recipe]:
    """What `run` was asked to run, in place of running it."""
    found: list[Recipe] = []
    monkeypatch.setattr(run_module, "run_recipe", found.append)
    return found


def test_overrides_and_flags_reach_the_recipe_and_flags_win(
    monkeypatch: pytest.MonkeyPatch, recipes: list[Recipe]
) -> None:
    arguments = [
        "run",
        "recipes/resnet.yaml",
        "data.calibration_samples=256",
        "budget=weights=30%",
        "--budget",
        "weights=1.5MB,bops=10%",
        "--target",
        "reference",
        "--output",
        "a folder: 'named' \"oddly\"",
    ]
    assert call(monkeypatch, *arguments) == 0
    (recipe,) = recipes
    assert recipe.data.calibration_samples == 256
    assert str(recipe.budget) == "weights=1.5MB,bops=10%"
    assert recipe.target == "reference"
    assert recipe.output == Path("a folder: 'named' \"oddly\"")


def test_without_flags_the_recipe_stays_as_it_is(
    monkeypatch: pytest.MonkeyPatch, recipes: list[Recipe]
) -> None:
    assert call(monkeypatch, "run", "resnet.yaml") == 0
    assert (recipes[0].target, str(recipes[0].budget)) == ("onnxruntime", "weights=15%")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "nothing.yaml"], "there is no recipe 'nothing.yaml'"),
        (["run", "resnet.yaml", "data.cal=3"], "data.cal: there is no such key"),
        (["run", "resnet.yaml", "--budget", "weights"], "cannot read 'weights'"),
        (["run", "resnet.yaml", "--target", "tpu"], "no target 'tpu'"),
        (["inspect", "nothing.yaml"], "there is no recipe 'nothing.yaml'"),
        (["inspect", "."], "is a folder without graph.json"),
    ],
)
def test_an_error_is_one_message_and_exit_code_two(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    arguments: list[str],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert words in error
    assert "Traceback" not in error


def test_inspect_prints_the_groups(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "inspect", "resnet.yaml", "exclude=[classifier]") == 0
    printed = capsys.readouterr().out
    assert printed.startswith("21 layers in 19 groups for onnxruntime")
    assert "fused: 10 conv-relu, 9 add-relu" in printed
    assert re.search("shortcut.0 +conv 32x16x1x1 +100 k MACs, reads the input of conv1", printed)
    assert "kept in float by the user" in printed
    # Nothing is cut where there is no terminal, nor filled up.
    assert printed.splitlines()[0].endswith("MACs a sample (100.0 % of all)")
    assert max(map(len, printed.splitlines())) < 200
    assert call(monkeypatch, "inspect", "resnet.yaml", "--target", "reference") == 0
    assert "groups for reference" in capsys.readouterr().out


def test_other_errors_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(recipe: Recipe) -> Any:
        raise ZeroDivisionError

    monkeypatch.setattr(run_module, "run_recipe", fail)
    monkeypatch.setattr(sys, "argv", ["fxmpq", "run", "resnet.yaml"])
    with pytest.raises(ZeroDivisionError):
        main()


def test_markup_in_messages_is_printed_as_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(recipe: Recipe) -> Any:
        raise FxmpqError("shape [2, 3] and [red]")

    monkeypatch.setattr(run_module, "run_recipe", fail)
    assert call(monkeypatch, "run", "resnet.yaml") == 2
    assert "shape [2, 3] and [red]" in capsys.readouterr().err


def test_version_and_help(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"fxmpq {fxmpq.__version__}\n"
    assert call(monkeypatch, "run", "--help") == 0
    assert "KEY=VALUE" in capsys.readouterr().out


@pytest.mark.parametrize("module", ["fxmpq", "fxmpq.cli"])
def test_it_runs_as_a_module(module: str) -> None:
    command = [sys.executable, "-W", "error", "-m", module, "--version"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout) == (0, f"fxmpq {fxmpq.__version__}\n"), found.stderr


def test_the_installed_command_starts_without_loading_the_recipes() -> None:
    code = (
        "import sys; from fxmpq.cli import app; "
        "sys.exit('fxmpq.recipes' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_importing_fxmpq_loads_nothing_large_that_it_may_not_need() -> None:
    code = (
        "import sys, fxmpq; sys.exit(bool({'sympy', 'lightning', 'matplotlib'} & {*sys.modules}))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
