"""`frozenprefix cache`."""

from __future__ import annotations

from typing import Annotated

import typer

from frozenprefix.cli.common import Overrides, RecipeFile, counted, is_main_process


def command(
    recipe: RecipeFile,
    overrides: Overrides = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="First set damaged shards aside and rebuild the indexes.")
    ] = False,
) -> None:
    """Encode every image of a recipe once, into the feature cache that `train` reads."""
    from frozenprefix.config import load_recipe
    from frozenprefix.utils import progress_bar

    loaded = load_recipe(recipe, overrides or [])  # first: the rest takes seconds to import
    from frozenprefix.training.caching import fill_cache

    with progress_bar("encoding images", enabled=is_main_process()) as update:
        filled = fill_cache(loaded, repair=repair, progress=update)
    if not filled.is_main:
        return
    rate = f" in {filled.seconds:.1f} s, {filled.encoded / filled.seconds:.1f} images/s" if filled.encoded else ""
    tokens, dim = filled.shape
    typer.echo(f"folder: {filled.folder}")
    typer.echo(f"images: {filled.images}, {filled.encoded} encoded now{rate}")
    typer.echo(f"features: {filled.features} x {tokens} x {dim} {filled.dtype}, {filled.bytes / 1e6:.1f} MB on disk")
    listed = f"{len(filled.bad)} ({counted(filled.bad.counts)}), listed in {filled.bad_list}"
    typer.echo(f"bad images: {listed if len(filled.bad) else 'none'}")
