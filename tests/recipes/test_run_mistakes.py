from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from fxmpq.errors import BudgetError, FxmpqError, TargetError
from fxmpq.recipes import run as run_module
from fxmpq.recipes.reading import open_recipe
from fxmpq.recipes.run import method_options, run_recipe
from fxmpq.recipes.schema import RecipeError

FEW = ["data.calibration_samples=48", "data.test_samples=64", "data.batch_size=16"]


@pytest.mark.parametrize(
    ("override", "error", "words"),
    [
        ("target=onnx", TargetError, "no target 'onnx'"),
        ("method=sqrn", FxmpqError, "no sensitivity method 'sqrn'.*'sqnr'"),
        ("options={probe: 3}", FxmpqError, "no option 'probe' .* there are 'probes'"),
        ("program=qudratic", FxmpqError, "no program 'qudratic'"),
        ("refine=lihgt", FxmpqError, "no refinement 'lihgt'"),
    ],
)
def test_mistakes_are_found_before_anything_is_loaded(
    override: str,
    error: type[Exception],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(run_module, "load", lambda recipe: pytest.fail("it loads"))
    recipe = open_recipe("resnet.yaml", [override, f"output={tmp_path}"])
    with pytest.raises(error, match=words):
        run_recipe(recipe, Console(file=io.StringIO()))


def test_what_nothing_here_measures_is_refused_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "load", lambda recipe: pytest.fail("it loads"))
    asked = ["target=reference", "budget=latency=60%", f"output={tmp_path}"]
    with pytest.raises(FxmpqError, match="latency cannot be measured for target 'reference'"):
        run_recipe(open_recipe("resnet.yaml", asked), Console(file=io.StringIO()))


def test_a_budget_out_of_reach_is_explained(tmp_path: Path) -> None:
    recipe = open_recipe(
        "resnet.yaml", [*FEW, "target=reference", "budget=weights=5%", f"output={tmp_path}"]
    )
    with pytest.raises(BudgetError, match="smallest value reachable"):
        run_recipe(recipe, Console(file=io.StringIO()))


def test_an_output_that_is_a_file_is_explained(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    recipe = open_recipe("resnet.yaml", [f"output={tmp_path / 'file'}"])
    with pytest.raises(RecipeError, match="cannot write to the output folder"):
        run_recipe(recipe, Console(file=io.StringIO()))


def test_numbers_that_yaml_takes_for_text_and_losses_that_a_recipe_cannot_name() -> None:
    def options(*overrides: str) -> dict[str, object]:
        return method_options(open_recipe("resnet.yaml", ["method=finetune", *overrides]))

    assert options("options.learning_rate=1e-3")["learning_rate"] == 0.001
    assert options("options.learning_rate=0.5", "options.epochs=2")["epochs"] == 2
    with pytest.raises(RecipeError, match=r"options.learning_rate is 'fast'; it must be a number"):
        options("options.learning_rate=fast")
    with pytest.raises(RecipeError, match="a recipe names no loss"):
        options("options.loss=training_step")
