"""`frozenprefix caption`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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
    one_line,
    print_left_out,
    shown,
)
from frozenprefix.cli.others import NumOthers, Others, other_images
from frozenprefix.errors import ConfigError, DataError

if TYPE_CHECKING:
    from frozenprefix.inference import Caption, Captioner, SupportedCaptioner


class Engine(str, Enum):
    """What runs the language model."""

    torch = "torch"
    llama_cpp = "llama.cpp"


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
    engine: Annotated[
        Engine, typer.Option(help="What runs the language model; llama.cpp reads a GGUF file and searches greedily.")
    ] = Engine.torch,
    evidence: Annotated[
        float | None,
        typer.Option(
            metavar="FLOOR",
            help="Leave out what other images support as well: words with less evidence, in nats, such as 0.",
        ),
    ] = None,
    others: Others = None,
    num_others: NumOthers = 16,
    out: Annotated[Path | None, typer.Option(help="JSON lines file to write to, instead of the screen.")] = None,
    force: Force = False,
) -> None:
    """Write a caption for every image. Exit code 1 if some cannot be read."""
    # check the arguments first: the model takes seconds to import
    from frozenprefix.assets import check_checkpoint
    from frozenprefix.data.images import BadImages

    check_checkpoint(checkpoint)
    if out is not None:
        from frozenprefix.utils import check_output

        keys = {"image", "caption", "score", *(() if evidence is None else ("whole", "dropped", "evidence"))}
        check_output(out, keys, exact=True, force=force)
    images = list_images(paths)
    captioner = load_captioner(engine, beams, checkpoint, language_model=language_model, precision=precision.value)
    captioning: Any = captioner
    if evidence is not None:
        captioning = supported_captioner(captioner, engine, evidence, checkpoint, images, others, num_others)
    bad = BadImages()
    beams = beams or (5 if engine is Engine.torch else 1)
    captions = captioning.caption(images, prompt=prompt, num_beams=beams, max_new_tokens=max_new_tokens, bad=bad)
    if out is None:
        for caption in captions:
            typer.echo(f"{shown(caption.path)}\t{one_line(caption.text)}")
    else:
        write_captions(captions, out)
        typer.echo(f"{len(images) - len(bad)} captions in {out}", err=True)
    print_left_out(bad, "PATH", len(images))
    if len(bad):
        raise typer.Exit(1)


def load_captioner(engine: Engine, beams: int | None, checkpoint: str, **options: Any) -> Captioner:
    """Load a checkpoint, with its language model in the engine.

    Raises:
        ConfigError: for beams that the engine does not have.
    """
    if engine is Engine.torch:
        from frozenprefix.inference import Captioner

        return Captioner.from_pretrained(checkpoint, **options)
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


def write_captions(captions: Iterable[Caption], out: Path) -> None:
    """Write `image`, `caption` and `score`, one object a line, each as soon as it is generated.

    Supported captions have `whole`, `dropped` and `evidence` too.
    """
    from frozenprefix.utils import append_jsonl

    if out.is_file():
        out.unlink()
    append_jsonl(out, [])
    for caption in captions:
        row = {"image": str(caption.path), "caption": caption.text, "score": caption.score}
        more = {name: getattr(caption, name) for name in ("whole", "dropped", "evidence") if hasattr(caption, name)}
        append_jsonl(out, [{**row, **more}])


def list_images(paths: Sequence[Path]) -> list[Path]:
    """Files as they are, folders as the images in them, however deep; each image once.

    Raises:
        DataError: naming every path that is not there, or a folder without images.

    Example:
        >>> len(list_images([images_folder, image_path]))
        12
    """
    from frozenprefix.data.images import find_images

    missing = [str(path) for path in paths if not path.exists()]
    if missing:
        raise DataError(f"PATH: got {', '.join(missing)}, which {'does' if len(missing) == 1 else 'do'} not exist")
    images: dict[Path, None] = {}
    for path in paths:
        images.update(dict.fromkeys(find_images(path) if path.is_dir() else [path]))
    return list(images)
