"""`frozenprefix train`."""

from __future__ import annotations

from typing import Annotated

import typer

from frozenprefix.cli.common import Overrides, RecipeFile, is_main_process, say_stages


def command(
    recipe: RecipeFile,
    overrides: Overrides = None,
    resume: Annotated[
        str,
        typer.Option(metavar="auto|never|PATH", help="Resume the run's last state, start over, or resume a folder."),
    ] = "auto",
    plan_first: Annotated[
        bool, typer.Option("--plan", help="Measure first, and say how long each stage of the run will take.")
    ] = False,
) -> None:
    """Train the mapper of a recipe. With `kind: contrastive` train a text tower for a locked image encoder."""
    from frozenprefix.config import load_recipe

    loaded = load_recipe(recipe, overrides or [])  # first: the trainer takes seconds to import
    if plan_first and is_main_process():
        say_stages(loaded)
    from frozenprefix.training.registry import train_recipe

    result = train_recipe(loaded, resume=resume)
    if is_main_process():
        value = "" if result.best_value is None else f", validation {result.best_by} {result.best_value:.4f}"
        typer.echo(f"{result.steps} steps, {result.targets_seen} targets in {result.seconds:.0f} s")
        typer.echo(f"best checkpoint: {result.best}{value}")
