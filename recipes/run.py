"""Running a recipe: from its text to a plan, a report, a picture and a converted model."""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from fxmpq.pipeline import quantize, refine_folder
from fxmpq.quantized import Quantized
from fxmpq.recipes.loading import Loaded, load
from fxmpq.recipes.schema import LANGUAGE, Recipe, RecipeError
from fxmpq.recipes.token_sequences import language_loss
from fxmpq.refinement.refine import check_refinement
from fxmpq.report.build import build_report
from fxmpq.report.html import save_html
from fxmpq.report.latency import use_threads
from fxmpq.report.plots import save_picture
from fxmpq.report.refinement_plot import save_refinement
from fxmpq.report.report import Report
from fxmpq.report.tables import print_tables
from fxmpq.sensitivity.measure import METHODS, check_method
from fxmpq.sensitivity.measure import method_options as option_names
from fxmpq.solver.programs import check_program, program_of
from fxmpq.steps import further_of
from fxmpq.targets.registry import get_target
from fxmpq.training.loss import batch_samples, classification_loss
from fxmpq.wording import decibels, percent, seconds


def run_recipe(recipe: Recipe, console: Console | None = None) -> Report:
    """Load, quantize, convert and measure what a recipe names, and write everything down.

    Writes to `recipe.output`: `recipe.yaml` (with every default filled in), `plan.json`,
    `report.json`, `report.html`, `tradeoff.png`, `tradeoff.svg`, the same of `refinement` where
    there is one, and the converted model. A search that is interrupted leaves `search.journal`
    (and a folder `search.journal.refine`), and the same recipe run again goes on from there.

    Args:
        recipe: From `open_recipe` or `read_recipe`.
        console: Where progress and the two tables are printed; standard output if `None`.

    Returns:
        The report.

    Raises:
        FxmpqError: A subclass for each unusable request; what can be checked without loading
            the model is checked first.
    """
    console = console or Console()
    further_of(get_target(recipe.target), recipe.budget.metrics)
    options = method_options(recipe)
    check_program(recipe.program or program_of(recipe.method), method=recipe.method)
    if recipe.refine is not None:
        check_refinement(recipe.refine, has_labels=False)
    with use_threads(recipe.threads):
        return _run(recipe, options, _writable(recipe.output), console)


def _run(recipe: Recipe, options: Mapping[str, Any], output: Path, console: Console) -> Report:
    say = _speaker(console)
    say(f"loading {recipe.model.name} and its data")
    loaded = load(recipe)
    say(f"searching precisions for {loaded.model_text} at {recipe.budget} on {recipe.target}")
    journal = output / "search.journal"
    quantized = _search(recipe, loaded, options, journal)
    journal.unlink()
    shutil.rmtree(f"{refine_folder(journal)}", ignore_errors=True)
    plan = quantized.plan
    plan.to_json(output / "plan.json")
    say(
        f"found a plan with {percent(plan.relative['weights'])} of the weights' size, predicted "
        f"output SQNR {decibels(plan.sqnr_db)} ({seconds(quantized.seconds)})"
    )
    report = build_report(
        quantized,
        loaded.test,
        loaded.labels,
        title=recipe.title or loaded.model_text,
        metric=loaded.metric,
        model=loaded.model_text,
        data=loaded.data_text,
        calibration_samples=recipe.data.calibration_samples,
        uniform=recipe.uniform,
        output=output,
        say=say,
    )
    console.print()
    print_tables(report, console)
    written = ["recipe.yaml", "plan.json", *_write(recipe, report, output), *report.files]
    console.print(f"Written to {output}: {', '.join(written)}", soft_wrap=True, highlight=False)
    return report


def method_options(recipe: Recipe) -> dict[str, object]:
    """The options of a recipe's method, with the recipe's seed and a loss where it takes them.

    Args:
        recipe: Whose `method` and `options` count.

    Returns:
        Keyword arguments of the method.

    Raises:
        FxmpqError: If the method is unknown, or has no such option, with those it has; or an
            option has no value that a recipe can give.
    """
    losses: dict[str, object] = {}
    if "loss" in recipe.options:
        raise RecipeError(
            "a recipe names no loss: it is the cross-entropy of the calibration samples' labels "
            "or next tokens. "
            "Leave out options.loss"
        )
    if recipe.method in METHODS and METHODS[recipe.method].labels:
        is_language = recipe.model.source == "transformers" and recipe.model.task == LANGUAGE
        losses["loss"] = language_loss if is_language else classification_loss
    check_method(recipe.method, [*recipe.options, *losses])
    legal = option_names(recipe.method)
    seeds: Mapping[str, object] = {"seed": recipe.seed} if "seed" in legal else {}
    options = {name: _number(recipe.method, name, entry) for name, entry in recipe.options.items()}
    return {**seeds, **losses, **options}


def _number(method: str, name: str, value: object) -> object:
    """An option's value; a number like 1e-3, which YAML takes for text, is read as one."""
    default = inspect.signature(METHODS[method].estimate).parameters[name].default
    try:
        return float(value) if isinstance(value, str) and isinstance(default, float) else value
    except ValueError as error:
        raise RecipeError(f"options.{name} is {value!r}; it must be a number") from error


def _search(recipe: Recipe, loaded: Loaded, options: Mapping[str, Any], journal: Path) -> Quantized:
    return quantize(
        loaded.model,
        loaded.calibration,
        target=recipe.target,
        budget=recipe.budget,
        candidates=recipe.candidates,
        method=recipe.method,
        program=recipe.program,
        labelled=_labelled(loaded) if "loss" in options else None,
        keep=recipe.keep,
        exclude=recipe.exclude,
        ties=recipe.ties,
        products=recipe.products,
        ranges=recipe.ranges,
        weight_scales=recipe.weight_scales,
        bias_correction=recipe.bias_correction,
        refine=recipe.refine,
        resume=journal,
        **options,
    )


def _labelled(loaded: Loaded) -> list[object]:
    """The calibration batches with their labels, as the recipes' losses take them."""
    start = 0
    found: list[object] = []
    for batch in loaded.calibration:
        end = start + batch_samples(batch)
        found.append((batch, loaded.calibration_labels[start:end]))
        start = end
    return found


def _write(recipe: Recipe, report: Report, output: Path) -> list[str]:
    """Write what people read; returns the file names."""
    settings = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)
    (output / "recipe.yaml").write_text(settings, encoding="utf-8")
    report.to_json(output / "report.json")
    pages = [
        save_html(report, output / "report.html"),
        *save_picture(report, output),
        *save_refinement(report, output),
    ]
    return ["report.json", *(page.name for page in pages)]


def _speaker(console: Console) -> Callable[[str], None]:
    return lambda text: console.print(f"• {text}", soft_wrap=True, highlight=False)


def _writable(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecipeError(f"cannot write to the output folder {str(folder)!r}: {error}") from error
    return folder
