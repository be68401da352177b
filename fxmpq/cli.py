"""The command line: `fxmpq run recipes/resnet.yaml`, `fxmpq inspect recipes/resnet.yaml`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fxmpq import __version__
from fxmpq.errors import FxmpqError

_WIDEST = 10_000

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Mixed-precision quantization of PyTorch models.",
    pretty_exceptions_enable=False,
)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"fxmpq {__version__}")
        raise typer.Exit


@app.callback()
def options(
    *,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Choose, layer by layer, how few bits a trained network can live with, and convert it."""


@app.command()
def run(
    recipe: Annotated[
        str,
        typer.Argument(
            help="A YAML file; where there is none, the recipe of this name that comes with "
            "fxmpq, as recipes/resnet.yaml."
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]",
            help="Values to use in place of the recipe's, as data.calibration_samples=256.",
        ),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder to write to.")] = None,
    budget: Annotated[
        str | None, typer.Option(help="As weights=15% or weights=1.5MB,bops=10%.")
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="As onnxruntime, or a TOML file that describes one.")
    ] = None,
) -> None:
    """Run a recipe: quantize, convert and measure a model, and write a report."""
    # Arrows point from recipes to fxmpq. The command line is the one exception, since its
    # commands are the recipes'; it imports them in here, so that the library never does.
    from fxmpq.recipes.reading import open_recipe
    from fxmpq.recipes.run import run_recipe

    flags = {"output": output, "budget": budget, "target": target}
    named = [f"{key}={json.dumps(str(value))}" for key, value in flags.items() if value is not None]
    run_recipe(open_recipe(recipe, [*(overrides or []), *named]))


@app.command()
def inspect(
    source: Annotated[
        str,
        typer.Argument(
            metavar="FOLDER_OR_RECIPE", help="A folder that fxmpq.save wrote, or a recipe."
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]",
            help="Values to use in place of the recipe's, as exclude=[classifier].",
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            help="As onnxruntime, or a TOML file that describes one. Without it, a recipe's or a "
            "prepared graph's own; of a graph that is only traced, reference."
        ),
    ] = None,
) -> None:
    """Show which layers share a precision, what they may take, and what stays in float."""
    from fxmpq.recipes.inspecting import prepared_graph
    from fxmpq.report.groups import describe_groups

    tree = describe_groups(prepared_graph(source, overrides or [], target))
    console = Console()
    if not console.is_terminal:
        # A tree is cut at the width, which a file or a pipe does not have.
        console = Console(width=_WIDEST)
    console.print(tree, highlight=False)


def main() -> None:
    """Run the command line; an error of fxmpq is one message and exit code 2."""
    try:
        app()
    except FxmpqError as error:
        Console(stderr=True).print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
