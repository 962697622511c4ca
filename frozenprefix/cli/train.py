"""`frozenprefix train`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer


def command(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="Recipe file (YAML).", show_default=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Changes to it: training.learning_rate=1e-4", show_default=False),
    ] = None,
    resume: Annotated[
        str, typer.Option(metavar="auto|never|PATH", help="Go on from the run's last state, start anew, or a folder.")
    ] = "auto",
) -> None:
    """Train the mapper of a recipe. With `kind: contrastive` it is a text tower that meets a locked image encoder."""
    from frozenprefix.config import load_recipe

    loaded = load_recipe(recipe, overrides or [])  # first: the trainer takes seconds to import
    from frozenprefix.training.registry import train_recipe

    result = train_recipe(loaded, resume=resume)
    if int(os.environ.get("RANK", "0")) == 0:  # as accelerate and torchrun number processes
        value = "" if result.best_value is None else f", validation {result.best_by} {result.best_value:.4f}"
        typer.echo(f"{result.steps} steps, {result.targets_seen} targets in {result.seconds:.0f} s")
        typer.echo(f"best checkpoint: {result.best}{value}")
