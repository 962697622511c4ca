"""`frozenprefix search`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    checkpoint: Annotated[str, typer.Argument(metavar="CHECKPOINT", help="Checkpoint folder.", show_default=False)],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of images.", show_default=False)],
    query: Annotated[str, typer.Argument(metavar="QUERY", help="What the images should show.", show_default=False)],
    k: Annotated[int, typer.Option("-k", "--top", min=1, help="Images to find.")] = 5,
    index: Annotated[
        Path | None, typer.Option(help="Folder to keep the index in; the user's cache when not given.")
    ] = None,
    faiss: Annotated[bool, typer.Option("--faiss", help="Search with faiss, for very many images.")] = False,
) -> None:
    """Find the images of a folder that fit a text. The folder is indexed once; later only what has changed."""
    from frozenprefix.cli.caption import find_images
    from frozenprefix.errors import DataError

    if not folder.is_dir():
        raise DataError(f"DIR: got {folder}, expected a folder of images")
    images = find_images([folder])  # first: the model takes seconds to import
    from rich.console import Console
    from rich.progress import Progress

    from frozenprefix.data.images import BadImages
    from frozenprefix.inference.embedding import Embedder
    from frozenprefix.inference.image_index import index_folder, open_index

    embedder = Embedder.from_pretrained(checkpoint)
    bad = BadImages()
    with Progress(console=Console(stderr=True), transient=True) as bar:
        line = bar.add_task("indexing images", total=None)
        found = open_index(
            embedder,
            images,
            index or index_folder(folder, embedder.fingerprint()),
            bad=bad,
            progress=lambda done, total: bar.update(line, completed=done, total=total),
        )
    for _, error in bad:
        typer.secho(f"skipped, {error.reason}: {error}", fg=typer.colors.RED, err=True)
    for hit in found.search(embedder.embed_texts([query]), k, faiss=faiss)[0]:
        typer.echo(f"{hit.score:.4f}\t{hit.path}")
