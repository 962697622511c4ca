"""`frozenprefix caption`."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from frozenprefix.cli.common import (
    Arithmetic,
    Checkpoint,
    Force,
    LanguageModel,
    MaxNewTokens,
    Precision,
    Prompt,
    list_images,
    one_line,
    print_left_out,
    shown,
)
from frozenprefix.cli.others import NumOthers, Others, other_images
from frozenprefix.errors import ConfigError, DataError

if TYPE_CHECKING:
    from frozenprefix.inference import Captioner, SupportedCaptioner


class Engine(str, Enum):
    """What runs the language model."""

    torch = "torch"
    llama_cpp = "llama.cpp"


class Format(str, Enum):
    """What captions are written as."""

    jsonl = "jsonl"
    csv = "csv"
    txt = "txt"


Ensemble = Annotated[
    list[str] | None,
    typer.Option(
        metavar="CHECKPOINT",
        help="Another checkpoint with the same frozen parts, which chooses each word together with the first; may be "
        "given several times.",
        show_default=False,
    ),
]
EvidenceFloor = Annotated[
    float | None,
    typer.Option(
        metavar="FLOOR",
        help="Leave out what other images support as well: words with less evidence, in nats, such as 0.",
    ),
]
OutputFormat = Annotated[
    Format | None,
    typer.Option(
        "--format",
        help="JSON lines, a table for Excel, or a .txt for each image, beside it if no --out is given.",
        show_default="by the ending of --out",
    ),
]
Metadata = Annotated[
    str | None,
    typer.Option(
        "--write-metadata",
        metavar="FOLDER|sidecar|originals",
        help="Write captions as descriptions (XMP, and EXIF in JPEGs), too: into copies of the images in FOLDER, into "
        "IMAGE.xmp beside each image, or into the originals, which nothing else changes. Pixels stay.",
    ),
]


def command(
    checkpoint: Checkpoint,
    paths: Annotated[
        list[Path], typer.Argument(metavar="PATH", help="Images, and folders of them.", show_default=False)
    ],
    beams: Annotated[int | None, typer.Option(min=1, help="Beams; 1 is greedy.", show_default="5")] = None,
    max_new_tokens: MaxNewTokens = 30,
    prompt: Prompt = None,
    language_model: LanguageModel = None,
    precision: Precision = Arithmetic.auto,
    ensemble: Ensemble = None,
    engine: Annotated[
        Engine, typer.Option(help="What runs the language model; llama.cpp reads a GGUF file and searches greedily.")
    ] = Engine.torch,
    evidence: EvidenceFloor = None,
    others: Others = None,
    num_others: NumOthers = 16,
    out: Annotated[
        Path | None, typer.Option(help="File to write to, instead of the screen; with --format txt a folder.")
    ] = None,
    form: OutputFormat = None,
    metadata: Metadata = None,
    force: Force = False,
) -> None:
    """Write a caption for every image. Exit code 1 if some cannot be read."""
    # check the arguments first: the model takes seconds to import
    from frozenprefix.assets import check_checkpoint
    from frozenprefix.data.images import BadImages

    check_checkpoint(checkpoint)
    images = list_images(paths)
    writers = open_writers(images, out, form, metadata, force=force)
    if ensemble and evidence is not None:
        raise ConfigError("--evidence: it is that of one model; leave out --ensemble")
    parts = {"language_model": language_model, "precision": precision.value}
    captioner = load_captioner(engine, beams, checkpoint, ensemble or (), **parts)
    captioning: Any = captioner
    if evidence is not None:
        captioning = supported_captioner(captioner, engine, evidence, checkpoint, images, others, num_others)
    bad = BadImages()
    beams = beams or (5 if engine is Engine.torch else 1)
    captions = captioning.caption(images, prompt=prompt, num_beams=beams, max_new_tokens=max_new_tokens, bad=bad)
    to_screen = out is None and form is None
    for caption in captions:
        for writer in writers:
            writer.write(caption.path, caption.text, caption.score)
        if to_screen:
            typer.echo(f"{shown(caption.path)}\t{one_line(caption.text)}")
        if dropped := getattr(caption, "dropped", ()):
            typer.echo(one_line(f"{shown(caption.path)}: not supported: {'; '.join(dropped)}"), err=True)
    for writer in writers:
        writer.finish()
    if not to_screen:
        typer.echo(f"{len(images) - len(bad)} captions in {out or '.txt files beside the images'}", err=True)
    if metadata is not None:
        place = {"sidecar": ".xmp files beside the images", "originals": "the images"}.get(metadata, metadata)
        typer.echo(f"{len(images) - len(bad)} descriptions in {place}", err=True)
    print_left_out(bad, "PATH", len(images))
    if len(bad):
        raise typer.Exit(1)


def load_captioner(
    engine: Engine, beams: int | None, checkpoint: str, ensemble: Sequence[str] = (), **options: Any
) -> Captioner:
    """Load a checkpoint and those of its ensemble, with the language model in the engine.

    Raises:
        ConfigError: for beams or an ensemble, which the engine does not have.
    """
    if engine is Engine.torch:
        from frozenprefix.inference import Captioner

        return Captioner.from_pretrained(checkpoint, ensemble=ensemble, **options)
    if ensemble:
        raise ConfigError(f"--ensemble: {engine.value} runs one model; leave out --engine")
    if beams not in (None, 1):
        raise ConfigError(f"--beams: got {beams}, but --engine llama.cpp searches greedily; give --beams 1")
    from frozenprefix.inference.llama_cpp import LlamaCppCaptioner

    return LlamaCppCaptioner.from_pretrained(checkpoint, **options)


def supported_captioner(
    captioner: Captioner,
    engine: Engine,
    floor: float,
    checkpoint: str,
    images: Sequence[Path],
    others: Path | None,
    num_others: int,
) -> SupportedCaptioner:
    """A captioner that leaves out what has less evidence than `floor`.

    Raises:
        ConfigError: for an engine that does not tell likelihoods.
        DataError: where there are no other images.
    """
    if engine is not Engine.torch:
        raise ConfigError(f"--evidence: {engine.value} does not tell how likely a word is; leave out --engine")
    from frozenprefix.inference import SupportedCaptioner

    found = other_images(captioner, checkpoint, images, others, num_others)
    if not len(found):
        raise DataError("--evidence: there are no other images to compare with; give a folder of them: --others DIR")
    return SupportedCaptioner(captioner, found, floor)


def open_writers(
    images: Sequence[Path], out: Path | None, form: Format | None, metadata: str | None, *, force: bool
) -> list[Any]:
    """What each caption is written by. All that can be refused is refused here.

    Raises:
        DataError: a file is in the way.
        ConfigError: a format without a file.
    """
    from frozenprefix.utils import caption_files as files

    writers: list[Any] = []
    if form is None and out is not None:
        form = Format.csv if out.suffix.lower() == ".csv" else Format.jsonl
    if form is Format.txt:
        writers.append(files.TextWriter(images, out=out, force=force))
    elif form is not None:
        if out is None:
            raise ConfigError(f"--format {form.value}: needs a file; give --out captions.{form.value}")
        writers.append((files.CsvWriter if form is Format.csv else files.JsonlWriter)(out, force=force))
    if metadata is not None:
        writers.append(files.MetadataWriter(images, metadata, force=force))
    return writers
