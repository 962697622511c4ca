"""`frozenprefix search`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from frozenprefix.cli.common import Checkpoint, print_left_out, shown
from frozenprefix.errors import DataError


def command(
    checkpoint: Checkpoint,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of images.", show_default=False)],
    query: Annotated[str, typer.Argument(metavar="QUERY", help="Text to search images by.", show_default=False)],
    k: Annotated[int, typer.Option("-k", "--top", min=1, help="Images to find.")] = 5,
    index: Annotated[
        Path | None, typer.Option(help="Folder to keep the index in; by default the user's cache.")
    ] = None,
    faiss: Annotated[bool, typer.Option("--faiss", help="Search with faiss, for very many images.")] = False,
) -> None:
    """Find the images of a folder that fit a text. The folder is indexed once; later only what has changed."""
    from frozenprefix.assets import check_checkpoint
    from frozenprefix.data.images import BadImages, find_images
    from frozenprefix.utils import progress_bar

    check_checkpoint(checkpoint)
    if not folder.is_dir():
        raise DataError(f"DIR: got {folder}, expected a folder of images")
    images = find_images(folder)  # first: the model takes seconds to import
    from frozenprefix.inference import Embedder, index_folder, open_index

    embedder, bad = Embedder.from_pretrained(checkpoint), BadImages()
    place = index or index_folder(folder, embedder.fingerprint())
    with progress_bar("indexing images") as update:
        image_index = open_index(embedder, images, place, bad=bad, progress=update)
    print_left_out(bad, "DIR", len(images))
    for hit in image_index.search(embedder.embed_texts([query]), k, faiss=faiss)[0]:
        typer.echo(f"{hit.score:.4f}\t{shown(hit.path)}")
