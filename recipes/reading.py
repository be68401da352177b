"""Reading a recipe: from a YAML file, or the packaged one of its name, with overrides."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path

import yaml

from fxmpq.errors import closest
from fxmpq.recipes.schema import Recipe, RecipeError, read_recipe


def open_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe file and apply overrides.

    Args:
        path: A YAML file; where there is none, the recipe of this file name that comes with
            fxmpq, so that `recipes/resnet.yaml` works anywhere.
        overrides: As `data.calibration_samples=256`; see `apply_override`.

    Returns:
        The recipe.

    Raises:
        RecipeError: If it is not found, is no YAML, or has unknown keys or wrong values.

    Examples:
        >>> open_recipe("resnet.yaml", ["data.batch_size=32"]).data.batch_size
        32
    """
    try:
        content = yaml.safe_load(_text_of(Path(path)))
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is no YAML: {error}") from error
    for override in overrides:
        content = apply_override(content, override)
    return read_recipe(content)


def apply_override(content: object, override: str) -> object:
    """Set one value of a recipe's content.

    Args:
        content: Nested mappings, as YAML gives them; not changed.
        override: `key=value` with dots between nested keys. The value is read as YAML, so
            `candidates=[w4a8,w8a8]`, `keep={classifier: w8a8}` and `uniform=null` work.

    Returns:
        The new content.

    Raises:
        RecipeError: If it is not of this form, or a key on the way holds no section.

    Examples:
        >>> apply_override({"data": {"batch_size": 64}}, "data.batch_size=32")
        {'data': {'batch_size': 32}}
    """
    key, equals, value = override.partition("=")
    names = key.strip().split(".")
    if not equals or not all(names):
        raise RecipeError(
            f"cannot read the override {override!r}; write key=value with dots between nested "
            "keys, as in data.calibration_samples=256"
        )
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise RecipeError(f"the value of the override {override!r} is no YAML: {error}") from error
    return _set(content, names, parsed, override)


def packaged_recipes() -> dict[str, str]:
    """The texts of the recipes that come with fxmpq, by file name."""
    home = resources.files("fxmpq.recipes")
    return {
        file.name: file.read_text(encoding="utf-8")
        for file in home.iterdir()
        if file.name.endswith(".yaml")
    }


def _text_of(path: Path) -> str:
    if path.is_file():
        return path.read_text(encoding="utf-8")
    packaged = packaged_recipes()
    if path.name not in packaged:
        raise RecipeError(
            f"there is no recipe {str(path)!r}, nor does one of this name come with fxmpq; "
            f"closest: {closest(path.name, packaged)}"
        )
    return packaged[path.name]


def _set(content: object, names: list[str], value: object, override: str) -> object:
    if not names:
        return value
    if content is not None and not isinstance(content, Mapping):
        raise RecipeError(
            f"the override {override!r} asks for {names[0]!r} inside {content!r}, which has no keys"
        )
    section = dict(content or {})
    section[names[0]] = _set(section.get(names[0]), names[1:], value, override)
    return section
