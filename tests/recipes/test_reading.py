from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from fxmpq.recipes.reading import apply_override, open_recipe, packaged_recipes
from fxmpq.recipes.schema import EmbeddedData, RecipeError, TransformersModel

KEYS = st.text("abc", min_size=1, max_size=3)
VALUES = st.one_of(st.integers(), st.booleans(), st.none(), st.lists(st.integers(), max_size=3))


def test_every_packaged_recipe_can_be_read() -> None:
    assert set(packaged_recipes()) == {"bert.yaml", "decoder.yaml", "resnet.yaml"}
    blocks = ("w2b32", "w4b32", "w8b32")
    for name in packaged_recipes():
        expected = blocks if name == "decoder.yaml" else ("w2a8", "w4a8", "w8a8")
        assert open_recipe(name).candidates == expected


def test_the_demo_asks_for_what_it_promises() -> None:
    recipe = open_recipe("recipes/resnet.yaml")
    assert (recipe.target, str(recipe.budget)) == ("onnxruntime", "weights=15%")
    assert isinstance(recipe.data, EmbeddedData)
    assert recipe.data.calibration_samples >= 512
    assert (recipe.data.test_samples or 0) >= 2000


def test_a_path_that_is_not_there_means_the_packaged_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert open_recipe("recipes/resnet.yaml") == open_recipe("resnet.yaml")


def test_a_file_comes_first(tmp_path: Path) -> None:
    file = tmp_path / "resnet.yaml"
    content = yaml.safe_load(packaged_recipes()["resnet.yaml"])
    file.write_text(yaml.safe_dump({**content, "title": "My own"}))
    assert open_recipe(file).title == "My own"


def test_overrides_reach_nested_keys_in_order() -> None:
    recipe = open_recipe(
        "resnet.yaml",
        [
            "data.batch_size=8",
            "budget=weights=20%",
            'keep={"stage1.0.*": w8a8}',
            "data.batch_size=9",
        ],
    )
    assert (recipe.data.batch_size, str(recipe.budget)) == (9, "weights=20%")
    assert recipe.keep == {"stage1.0.*": "w8a8"}


def test_an_override_can_change_the_source() -> None:
    recipe = open_recipe(
        "resnet.yaml",
        [
            "model={source: transformers, name: a/b, task: image-classification}",
            "data={source: hub, name: c/d, input_columns: [image]}",
        ],
    )
    assert isinstance(recipe.model, TransformersModel)


@given(st.lists(KEYS, min_size=1, max_size=3), VALUES)
def test_an_override_sets_one_value_and_changes_nothing_else(
    keys: list[str], value: object
) -> None:
    content = {"other": {"a": 1}}
    text = f"{'.'.join(keys)}={yaml.safe_dump(value, default_flow_style=True)}"
    found = apply_override(content, text)
    assert content == {"other": {"a": 1}}
    for key in keys:
        assert isinstance(found, dict)
        found = found[key]
    assert found == value


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.batch_size", "write key=value"),
        ("=3", "write key=value"),
        ("data..size=3", "write key=value"),
        ("data=[1", "no YAML"),
        ("title.x=3", "asks for 'x' inside 'ResNet-20 on Fashion-MNIST', which has no keys"),
        ("data.batchsize=3", "closest: 'batch_size'"),
    ],
)
def test_overrides_that_cannot_be_used_are_explained(override: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        open_recipe("resnet.yaml", [override])


def test_unknown_and_broken_files_are_explained(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"'resent.yaml'.*closest: 'resnet.yaml'"):
        open_recipe("resent.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("model: [")
    with pytest.raises(RecipeError, match="is no YAML"):
        open_recipe(broken)
    code = tmp_path / "code.yaml"
    code.write_text("model: !!python/object/apply:os.getcwd []")
    with pytest.raises(RecipeError, match="is no YAML"):
        open_recipe(code)
