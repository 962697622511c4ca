"""Options of commands that compare an image with others: which ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from torch import Tensor

    from frozenprefix.inference import Captioner

Others = Annotated[
    Path | None,
    typer.Option(help="Folder of other images, for evidence; by default the recipe's validation images."),
]
NumOthers = Annotated[int, typer.Option(min=1, help="Other images to compare with, for evidence.")]


def other_images(captioner: Captioner, checkpoint: str, own: Sequence[Path], folder: Path | None, count: int) -> Tensor:
    """Features float[M, N, D_enc] of up to `count` other images, the same ones for the same data.

    They come from a folder, else from the validation data of the checkpoint's recipe, else they are the images
    themselves, if there are several. There may be none.

    Raises:
        DataError: for a folder without images.
    """
    from frozenprefix.cli.common import list_images
    from frozenprefix.evaluation import samples

    if folder is not None:
        candidates = list_images([folder])
    else:
        candidates = samples.recipe_images(checkpoint) or (list(own) if len(own) > 1 else [])
    without = own if folder is not None or len(candidates) > len(own) else ()
    return samples.other_images(captioner.encoder, candidates, count, without=without)
