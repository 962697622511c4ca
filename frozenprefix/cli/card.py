"""`frozenprefix card`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="Output folder of a run, or a checkpoint.", show_default=False)
    ],
    scores: Annotated[
        list[Path] | None,
        typer.Option(help="Result of evaluate --out; may be given several times. Those in RUN by default."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for README.md; the checkpoint's by default.")] = None,
    licence: Annotated[
        str | None, typer.Option("--license", help="Of the trained weights, as the Hub names it.")
    ] = None,
    images: Annotated[int, typer.Option(min=0, help="Evaluated images that are copied into the card.")] = 6,
    force: Annotated[
        bool, typer.Option("--force", help="Replace a README.md that is no card of this command.")
    ] = False,
) -> None:
    """Write a model card: parts and licences, scores with intervals and baselines, recipe, examples."""
    from frozenprefix.interpret import read_run, write_card

    path = write_card(read_run(run, scores or ()), out=out, licence=licence, images=images, force=force)
    typer.echo(f"wrote {path}")
