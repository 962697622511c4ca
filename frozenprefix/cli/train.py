"""`frozenprefix train`."""

from __future__ import annotations

import os
import shlex
from typing import TYPE_CHECKING, Annotated

import typer

from frozenprefix.cli.common import Overrides, RecipeFile, is_main_process
from frozenprefix.errors import ConfigError

if TYPE_CHECKING:
    from frozenprefix.config import ContrastiveRecipe, Recipe

CALIBRATE = 2.0  # seconds of steps, and half as many of encoding


def command(
    recipe: RecipeFile,
    overrides: Overrides = None,
    resume: Annotated[
        str,
        typer.Option(metavar="auto|never|PATH", help="Resume the run's last state, start over, or resume a folder."),
    ] = "auto",
    plan: Annotated[
        bool | None,
        typer.Option(
            "--plan/--no-plan",
            help="Measure some steps first, and say how long each stage will take; else estimate roughly.",
            show_default="a rough estimate",
        ),
    ] = None,
) -> None:
    """Train the mapper of a recipe. With `kind: contrastive` train a text tower for a locked image encoder."""
    from frozenprefix.config import load_recipe

    loaded = load_recipe(recipe, overrides or [])  # first: the trainer takes seconds to import
    if plan and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("--plan: measures one process; run `frozenprefix plan RECIPE` before, without a launcher")
    if plan is not False and is_main_process():
        say_stages(loaded, measure=bool(plan))
    from frozenprefix.training.registry import train_recipe

    result = train_recipe(loaded, resume=resume)
    if is_main_process():
        value = "" if result.best_value is None else f", validation {result.best_by} {result.best_value:.4f}"
        typer.echo(f"{result.steps} steps, {result.targets_seen} targets in {result.seconds:.0f} s")
        typer.echo(f"best checkpoint: {result.best}{value}")
        if hasattr(loaded.model, "mapper"):
            best, run = shlex.quote(str(result.best)), shlex.quote(str(result.output_dir))
            typer.echo("next:")
            for command in (f"caption {best} IMAGE...", f"explain {best} IMAGE... --out page.html", f"demo {best}"):
                typer.echo(f"  frozenprefix {command}")
            typer.echo(f"  frozenprefix report {run}")


def say_stages(recipe: Recipe | ContrastiveRecipe, *, measure: bool) -> None:
    """Print how long each stage of a run will take."""
    from frozenprefix.cli.plan import duration
    from frozenprefix.planning.stages import estimate_stages, stages_of
    from frozenprefix.utils import progress_bar

    if measure:
        from frozenprefix.planning.plan import plan

        with progress_bar("planning"):
            stages = stages_of(plan(recipe, (), calibrate=CALIBRATE), recipe)
    else:
        stages = estimate_stages(recipe)
    about = "" if measure else "about "
    times = ["" if stage.seconds is None else f" ({about}{duration(stage.seconds)})" for stage in stages]
    named = ", ".join(stage.name + time for stage, time in zip(stages, times, strict=True))
    known = [stage.seconds for stage in stages if stage.seconds is not None]
    typer.echo(f"stages: {named}" + (f"; {about}{duration(sum(known))} in all" if known else ""))
