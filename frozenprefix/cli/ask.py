"""`frozenprefix ask`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from frozenprefix.errors import DataError


def command(
    checkpoint: Annotated[str, typer.Argument(metavar="CHECKPOINT", help="Checkpoint folder.", show_default=False)],
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="Image file.", show_default=False)],
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="What to ask, in quotes.", show_default=False)],
) -> None:
    """Answer a question about an image."""
    if not image.is_file():
        raise DataError(f"IMAGE: got '{image}', expected an image file that exists")
    from frozenprefix.inference import Captioner

    typer.echo(Captioner.from_pretrained(checkpoint).answer(image, question))
