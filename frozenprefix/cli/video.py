"""`frozenprefix video`."""

from __future__ import annotations

from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from frozenprefix.cli.common import (
    Arithmetic,
    Checkpoint,
    Force,
    LanguageModel,
    Precision,
    Prompt,
    one_line,
    write_json,
)
from frozenprefix.errors import ConfigError, DataError

if TYPE_CHECKING:
    from frozenprefix.inference import Captioner


class Pooling(str, Enum):
    """How frames become prefixes."""

    mean = "mean"
    frames = "frames"


class Sampler(str, Enum):
    """Where a summary's segments begin."""

    scenes = "scenes"
    uniform = "uniform"


def command(
    checkpoint: Checkpoint,
    source: Annotated[
        str, typer.Argument(metavar="FILE", help="Video file; with --follow also /dev/video0.", show_default=False)
    ],
    summary: Annotated[bool, typer.Option("--summary", help="Segments with their times.")] = False,
    follow: Annotated[bool, typer.Option("--follow", help="Captions as the scene changes, with latencies.")] = False,
    frames: Annotated[int, typer.Option(min=1, help="Frames of a caption, or parts of a uniform summary.")] = 8,
    pooling: Annotated[
        Pooling, typer.Option(help="One prefix for the mean of the frames, or one each.")
    ] = Pooling.mean,
    sampler: Annotated[Sampler, typer.Option(help="Segments of a summary.")] = Sampler.scenes,
    beams: Annotated[
        int | None, typer.Option(min=1, help="Beams; 1 is greedy. By default 5, and 1 with --follow.")
    ] = None,
    prompt: Prompt = None,
    language_model: LanguageModel = None,
    precision: Precision = Arithmetic.auto,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="OUT", help="JSON file to write to.")] = None,
    force: Force = False,
) -> None:
    """Caption a video: as a whole, scene by scene, or as it runs."""
    from frozenprefix.assets import check_checkpoint
    from frozenprefix.utils import check_output

    check_checkpoint(checkpoint)
    if json_file is not None:
        check_output(json_file, {"video"}, force=force, option="--json")
    if summary and follow:
        raise ConfigError("--summary and --follow exclude each other; give one of them")
    if "://" not in source and not Path(source).exists():
        raise DataError(f"FILE: got '{source}', expected a video file that exists")
    from frozenprefix.inference import Captioner

    captioner = Captioner.from_pretrained(checkpoint, language_model=language_model, precision=precision.value)
    options: dict[str, Any] = {"prompt": prompt, "num_beams": beams or (1 if follow else 5)}
    if follow:
        result = _follow(captioner, source, options)
    else:
        from frozenprefix.inference import VideoCaptioner

        video = VideoCaptioner(captioner, frames=frames, pooling=pooling.value)
        if summary:
            segments = video.summary(source, sampler=sampler.value, **options)
            result = {"segments": [asdict(segment) for segment in segments]}
            for segment in segments:
                typer.echo(f"{segment.start:.2f}\t{segment.end:.2f}\t{one_line(segment.caption)}")
        else:
            generation = video.caption(source, **options)
            result = {"caption": generation.text, "score": generation.score}
            typer.echo(generation.text)
    write_json(json_file, {"video": source, **result})


def _follow(captioner: Captioner, source: str, options: dict[str, Any]) -> dict[str, Any]:
    from frozenprefix.inference import StreamCaptioner

    stream, captions = StreamCaptioner(captioner), []
    try:
        for caption in stream.follow(source, **options):
            typer.echo(f"{caption.time:.2f}\t{one_line(caption.caption)}")
            captions.append(asdict(caption))
    except KeyboardInterrupt:
        pass  # the only way to end a camera
    latency = stream.latency()
    figures = ", ".join(f"{name} {value:.1f}" for name, value in latency.items() if name.endswith("_ms"))
    typer.echo(f"{latency['frames']} frames, {latency['captioned']} captioned; {figures}", err=True)
    return {"captions": captions, "latency": latency}
