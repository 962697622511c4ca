"""`frozenprefix ask`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from frozenprefix.cli.common import Arithmetic, Checkpoint, LanguageModel, Precision, check_files


def command(
    checkpoint: Checkpoint,
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="Image file.", show_default=False)],
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="What to ask, in quotes.", show_default=False)],
    language_model: LanguageModel = None,
    precision: Precision = Arithmetic.auto,
) -> None:
    """Answer a question about an image."""
    from frozenprefix.assets import check_checkpoint

    check_checkpoint(checkpoint)
    check_files([image], "IMAGE")
    from frozenprefix.inference import Captioner

    captioner = Captioner.from_pretrained(checkpoint, language_model=language_model, precision=precision.value)
    typer.echo(captioner.answer(image, question))
