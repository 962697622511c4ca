"""`frozenprefix cache`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.progress import Progress


def command(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="Recipe file (YAML).", show_default=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Changes to it: data.feature_dtype=int8", show_default=False),
    ] = None,
) -> None:
    """Encode every image of a recipe once, into the feature cache that `train` reads."""
    from frozenprefix.config import load_recipe

    loaded = load_recipe(recipe, overrides or [])  # first: the rest takes seconds to import
    from frozenprefix.training.caching import fill_cache

    with _bar() as bar:
        task = bar.add_task("encoding images", total=None)
        filled = fill_cache(loaded, progress=lambda done, total: bar.update(task, completed=done, total=total))
    if not filled.is_main:
        return
    rate = f" in {filled.seconds:.1f} s, {filled.encoded / filled.seconds:.1f} images/s" if filled.encoded else ""
    tokens, dim = filled.shape
    typer.echo(f"folder: {filled.folder}")
    typer.echo(f"images: {filled.images}, {filled.encoded} encoded now{rate}")
    typer.echo(f"features: {filled.features} x {tokens} x {dim} {filled.dtype}, {filled.bytes / 1e6:.1f} MB on disk")
    if len(filled.bad):
        by_reason = ", ".join(f"{count} {reason}" for reason, count in filled.bad.counts.items())
        typer.echo(f"bad images: {len(filled.bad)} ({by_reason}), listed in {filled.bad_list}")
    else:
        typer.echo("bad images: none")


def _bar() -> Progress:
    import os

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
    from rich.progress import TimeRemainingColumn as Left
    from rich.text import Text

    class Speed(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(f"{task.speed or 0:.1f} images/s")

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Speed(), TextColumn("left"), Left())
    # as accelerate and torchrun number processes
    return Progress(*columns, console=Console(stderr=True), disable=os.environ.get("RANK", "0") != "0")
