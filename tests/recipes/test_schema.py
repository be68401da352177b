from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fxmpq.recipes.schema import (
    EmbeddedData,
    FilesData,
    HubData,
    Recipe,
    RecipeError,
    TransformersModel,
    read_recipe,
)
from fxmpq.solver.budget import Budget

EMBEDDED: dict[str, Any] = {
    "model": {"source": "embedded"},
    "data": {"source": "embedded"},
    "budget": "weights=15%",
}
TEXTS: dict[str, Any] = {
    "model": {"source": "transformers", "name": "a/b", "task": "text-classification"},
    "data": {"source": "hub", "name": "c/d", "input_columns": ["text"]},
    "budget": {"weights": "1MB", "bops": "10%"},
}


def changed(content: dict[str, Any], section: str | None = None, **values: object) -> dict:
    if section is None:
        return {**content, **values}
    return {**content, section: {**content[section], **values}}


def test_defaults_are_filled_in() -> None:
    recipe = read_recipe(EMBEDDED)
    assert recipe.data == EmbeddedData(source="embedded", calibration_samples=512, batch_size=64)
    assert (recipe.target, recipe.method, recipe.candidates) == ("onnxruntime", "projected", None)
    assert recipe.products is False


def test_sources_choose_their_sections() -> None:
    recipe = read_recipe(TEXTS)
    assert isinstance(recipe.model, TransformersModel)
    assert isinstance(recipe.data, HubData)
    assert (recipe.data.calibration_split, recipe.data.test_split) == ("train", "validation")
    files = {
        "source": "files",
        "format": "csv",
        "calibration": "a.csv",
        "test": "b.csv",
        "input_columns": ["one", "two"],
    }
    data = read_recipe(changed(TEXTS, data=files)).data
    assert isinstance(data, FilesData)
    assert data.calibration == Path("a.csv")
    assert data.describe() == "a.csv and b.csv (csv)"


def test_budget_and_precisions_are_read_and_written_again() -> None:
    content = changed(TEXTS, candidates=["W4A8"], keep={"head*": "w8A8"}, uniform=[])
    recipe = read_recipe(content)
    assert recipe.budget == Budget.parse("weights=1MB,bops=10%")
    assert (recipe.candidates, recipe.keep, recipe.uniform) == (("w4a8",), {"head*": "w8a8"}, ())
    written = recipe.model_dump(mode="json")
    assert written["budget"] == "weights=1MB,bops=10%"
    assert read_recipe(written) == recipe


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (changed(EMBEDDED, budgt="x"), r"budgt: there is no such key; closest: 'budget'"),
        (changed(EMBEDDED, "data", batchsize=3), r"data.batchsize: .* closest: 'batch_size'"),
        (changed(EMBEDDED, "data", batch_size=0), r"data.batch_size: .* greater than or equal"),
        (changed(EMBEDDED, "model", source="hub"), r"model.source: no source 'hub'; .*'embedded'"),
        (changed(EMBEDDED, "model", name="resnet"), r"model.name: .*'resnet20-fashion-mnist'"),
        (changed(EMBEDDED, model={}), r"model.source: missing"),
        (changed(EMBEDDED, budget="weights"), r"budget: cannot read 'weights'"),
        (changed(EMBEDDED, budget=15), r"budget: a budget is written as 'weights=15%'; found 15"),
        (changed(EMBEDDED, ranges="percentle"), r"ranges: no rule 'percentle'.*'percentile'"),
        (changed(EMBEDDED, ranges={"rule": "kl", "p": 1}), r"ranges: .* no option 'p'"),
        (changed(EMBEDDED, weight_scales=2), r"weight_scales: .* found 2. Rules: minmax, mse"),
        (changed(EMBEDDED, candidates=["w9a8"]), r"candidates.0: no 9-bit integer format"),
        (changed(EMBEDDED, candidates=[]), r"candidates: .* at least 1 item"),
        (changed(EMBEDDED, keep={"fc": "x"}), r"keep.fc: cannot read the precision 'x'"),
        (changed(EMBEDDED, ties="fc"), r"ties: ties is a list of ties, as \['fc'\]"),
        (changed(EMBEDDED, ties=[["fc", 3]]), r"ties: a tie is a pattern .*; found \['fc', 3\]"),
        (changed(TEXTS, "model", task="chat"), r"model.task: .*'text-classification'.* 'chat'"),
        (changed(TEXTS, data={"source": "embedded"}), "the embedded model and the embedded data"),
        ({"model": {"source": "embedded"}}, "(?s)data: missing.*budget: missing"),
        (["model"], "a recipe is a mapping .* found list"),
    ],
)
def test_every_mistake_is_named_with_what_would_work(content: object, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        read_recipe(content)


def test_rules_are_read_and_written_with_their_defaults() -> None:
    content = changed(EMBEDDED, ranges={"rule": "percentile", "percentile": 99.9})
    recipe = read_recipe(content)
    written = recipe.model_dump(mode="json")
    assert written["ranges"] == {"rule": "percentile", "percentile": 99.9}
    assert written["weight_scales"] == {"rule": "mse", "p": 2.0}
    assert read_recipe(written) == recipe
    assert read_recipe(changed(EMBEDDED, ranges="kl")).model_dump(mode="json")["ranges"] == "kl"


def test_ties_are_read_and_written_as_lists() -> None:
    recipe = read_recipe(changed(EMBEDDED, ties=["stage1.*", ["conv", "classifier"]]))
    assert recipe.ties == (("stage1.*",), ("conv", "classifier"))
    written = recipe.model_dump(mode="json")
    assert written["ties"] == [["stage1.*"], ["conv", "classifier"]]
    assert read_recipe(written) == recipe


def test_a_recipe_cannot_be_changed() -> None:
    recipe = read_recipe(EMBEDDED)
    with pytest.raises(ValueError, match="frozen"):
        recipe.target = "reference"
    assert isinstance(recipe, Recipe)
