"""`frozenprefix demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from frozenprefix.cli.common import Arithmetic, LanguageModel, Precision
from frozenprefix.errors import ConfigError

MOST_MODELS = 4


def command(
    checkpoints: Annotated[
        list[str], typer.Argument(metavar="CHECKPOINT...", help="Checkpoint folders or Hub ids, shown side by side.")
    ],
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 lets everyone in the network use the page.")
    ] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Port; by default the first free one from 7860.")
    ] = None,
    corrections: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder of corrections, which `train` reads as data.")
    ] = Path("corrections"),
    language_model: LanguageModel = None,
    precision: Precision = Arithmetic.auto,
) -> None:
    """Open a page to try checkpoints: captions word by word, questions, chat, evidence, corrections."""
    from frozenprefix.assets import check_checkpoint

    if len(checkpoints) > MOST_MODELS:
        raise ConfigError(f"CHECKPOINT: got {len(checkpoints)}, expected at most {MOST_MODELS} side by side")
    for checkpoint in checkpoints:
        check_checkpoint(checkpoint)
    from frozenprefix.demo import Corrections, DemoModel, Studio, serve
    from frozenprefix.demo.server import check_gradio

    check_gradio()
    kept = Corrections(corrections)
    options = {"language_model": language_model, "precision": precision.value}
    models = [DemoModel.load(checkpoint, **options) for checkpoint in checkpoints]
    serve(Studio(models, kept), host=host, port=port, ready=lambda url: _say(url, host))


def _say(url: str, host: str) -> None:
    if host not in ("127.0.0.1", "localhost", "::1"):
        typer.secho(f"Everyone who reaches {host} can use this page.", fg=typer.colors.YELLOW, err=True)
    typer.echo(f"The page is at {url} (Ctrl-C stops it)")
