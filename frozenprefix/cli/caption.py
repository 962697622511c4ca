"""`frozenprefix caption`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from frozenprefix.errors import DataError

if TYPE_CHECKING:
    from frozenprefix.inference import Caption


def command(
    checkpoint: Annotated[str, typer.Argument(metavar="CHECKPOINT", help="Checkpoint folder.", show_default=False)],
    paths: Annotated[
        list[Path], typer.Argument(metavar="PATH", help="Images, and folders of them.", show_default=False)
    ],
    beams: Annotated[int, typer.Option(min=1, help="Beams; 1 is greedy.")] = 5,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest caption, in tokens.")] = 30,
    prompt: Annotated[str | None, typer.Option(help="Text before the caption; the trained one when not given.")] = None,
    out: Annotated[Path | None, typer.Option(help="JSON lines file to write to, in place of the screen.")] = None,
) -> None:
    """Write a caption for every image. Exit code 1 when some could not be read."""
    images = find_images(paths)  # first: the model takes seconds to import
    from frozenprefix.data.images import BadImages
    from frozenprefix.inference import Captioner

    captioner = Captioner.from_pretrained(checkpoint)
    bad = BadImages()
    captions = captioner.caption(images, prompt=prompt, num_beams=beams, max_new_tokens=max_new_tokens, bad=bad)
    if out is None:
        for caption in captions:
            typer.echo(f"{caption.path}\t{caption.text}")
    else:
        write_jsonl(captions, out)
        typer.echo(f"{len(images) - len(bad)} captions in {out}", err=True)
    for _, error in bad:
        typer.secho(f"skipped, {error.reason}: {error}", fg=typer.colors.RED, err=True)
    if len(bad):
        raise typer.Exit(1)


def write_jsonl(captions: Iterable[Caption], out: Path) -> None:
    """One object a line, written as soon as it is there: `image`, `caption`, `score`."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", encoding="utf-8") as file:
        for caption in captions:
            row = {"image": str(caption.path), "caption": caption.text, "score": caption.score}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()


def find_images(paths: list[Path]) -> list[Path]:
    """Files as they are, folders as the images in them, however deep; each image once.

    Raises:
        DataError: naming every path that is not there.
    """
    from frozenprefix.data.sources import load_source

    missing = [str(path) for path in paths if not path.exists()]
    if missing:
        raise DataError(f"PATH: got {', '.join(missing)}, which {'does' if len(missing) == 1 else 'do'} not exist")
    found: dict[Path, None] = {}
    for path in paths:
        if path.is_dir():
            samples = load_source({"type": "image_folder", "path": str(path)})
            found.update(dict.fromkeys(sample.images[0] for sample in samples))
        else:
            found[path] = None
    return list(found)
