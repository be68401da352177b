"""What `fxmpq inspect` looks at: the prepared graph of a saved folder or of a recipe."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from torch import fx

from fxmpq.graph.state import state_of
from fxmpq.graph.trace import trace
from fxmpq.recipes.loading import load as load_recipe
from fxmpq.recipes.reading import open_recipe
from fxmpq.recipes.schema import RecipeError
from fxmpq.steps import prepare
from fxmpq.storage.load import load
from fxmpq.storage.save import FILE
from fxmpq.targets.registry import get_target


def prepared_graph(
    source: str | Path, overrides: Iterable[str] = (), target: str | None = None
) -> fx.GraphModule:
    """Load or make the graph of a folder or a recipe, with its groups.

    Args:
        source: A folder that `fxmpq.save` wrote, or a recipe, as `open_recipe` finds it.
        overrides: Of the recipe, as `exclude=[classifier]`.
        target: To prepare for, where the graph is not prepared yet; the recipe's own, or
            `reference` for a traced graph, if `None`.

    Returns:
        A prepared graph.

    Raises:
        FxmpqError: If the source is neither, or cannot be read, traced or prepared; or another
            target is asked for than the saved graph was prepared for.
    """
    overrides = list(overrides)
    if (Path(source) / FILE).is_file():
        return _saved_graph(Path(source), overrides, target)
    if Path(source).is_dir():
        raise RecipeError(
            f"{str(source)!r} is a folder without {FILE}; inspect a folder that fxmpq.save wrote, "
            "or a recipe, which names any model"
        )
    recipe = open_recipe(source, overrides)
    loaded = load_recipe(recipe)
    return prepare(
        trace(loaded.model, loaded.calibration[0]),
        target or recipe.target,
        candidates=recipe.candidates,
        keep=recipe.keep,
        exclude=recipe.exclude,
        ties=recipe.ties,
        products=recipe.products,
    )


def _saved_graph(folder: Path, overrides: list[str], target: str | None) -> fx.GraphModule:
    if overrides:
        raise RecipeError(f"{str(folder)!r} is a saved graph, which takes no {overrides[0]!r}")
    graph = load(folder)
    prepared_for = state_of(graph).target
    if prepared_for is None:
        return prepare(graph, target or "reference")
    if target is not None and get_target(target).name != prepared_for:
        raise RecipeError(
            f"asked for the target {target!r}; the graph in {str(folder)!r} was prepared for "
            f"{prepared_for!r}"
        )
    return graph
