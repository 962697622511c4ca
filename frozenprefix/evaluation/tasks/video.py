"""Captions of clips with references: the clip's own, beside what the LM says blind and of another clip."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from frozenprefix.data.features import ImageFeatures
from frozenprefix.data.images import BadImages
from frozenprefix.data.samples import Sample, check_unique_ids
from frozenprefix.errors import BadImageError, ConfigError
from frozenprefix.evaluation.journal import header_of
from frozenprefix.evaluation.result import Evaluated, evaluate_runs
from frozenprefix.evaluation.scoring import SCORERS
from frozenprefix.evaluation.tasks.generation import generate_settings, predict, predict_runs
from frozenprefix.evaluation.tasks.registry import EvaluationOptions, EvaluationTask, check_options
from frozenprefix.inference.captioner import Captioner
from frozenprefix.inference.video import VideoCaptioner

OPTIONS = ("frames", "pooling")


def evaluate_video(captioner: Captioner, samples: Sequence[Sample], options: EvaluationOptions) -> dict[str, Any]:
    """Evaluate samples whose one image is a video file, and whose targets are the references.

    Runs are "model", "blind" and "shuffled", as in `evaluate_generation`. Every process encodes all clips.

    Args:
        options: its `extra` takes `frames` (8) and `pooling` ("mean" or "frames"), see `VideoCaptioner`.

    Returns:
        As `EvaluationTask.run` says.

    Raises:
        ConfigError: for other options, or samples that are not of one video each.
        DataError: when too many videos cannot be read.
    """
    settings, video = _settings(captioner, samples, options)
    features, bad = _encode(video, samples)
    bad.check(len({sample.images for sample in samples}), options.max_bad_share)
    samples = [sample for sample in samples if sample.images[0] not in bad]
    # to the runs, the frames of a clip that are shown one after the other are so many images
    shown = [replace(sample, images=_places(sample, video)) for sample in samples]
    images = ImageFeatures(
        {
            place: feature
            for each in {sample.images[0]: sample for sample in samples}.values()
            for place, feature in zip(_places(each, video), features[each.images[0]], strict=True)
        },
        bad,
    )
    generate = generate_settings("caption", options)
    what = Evaluated("video", samples, SCORERS["caption"](samples), settings, bad)
    return evaluate_runs(
        what,
        lambda journal: predict_runs(
            captioner, shown, lambda batch: predict(captioner, batch, images, generate), journal, options
        ),
        header_of(captioner, samples, {"task": "video", **settings}),
        options,
    )


VIDEO = EvaluationTask(evaluate_video, sample_task="caption", takes_beams=True)


def _settings(
    captioner: Captioner, samples: Sequence[Sample], options: EvaluationOptions
) -> tuple[dict[str, Any], VideoCaptioner]:
    check_options("video", options.extra, OPTIONS)
    wrong = [sample.id for sample in samples if sample.task != "caption" or len(sample.images) != 1]
    if wrong:
        raise ConfigError(f"task 'video' takes captions of one video each; {len(wrong)} samples are others: {wrong[0]}")
    check_unique_ids(samples)
    video = VideoCaptioner(captioner, **options.extra)
    settings = {**generate_settings("caption", options), "frames": video.frames, "pooling": video.pooling}
    return settings, video


def _encode(video: VideoCaptioner, samples: Sequence[Sample]) -> tuple[dict[Path, Tensor], BadImages]:
    """Features of every clip that can be read, float32[1 or frames, N, D_enc]; short clips repeat their last frame."""
    features: dict[Path, Tensor] = {}
    bad = BadImages()
    for path in dict.fromkeys(sample.images[0] for sample in samples):
        try:
            found = video.features(path)
        except BadImageError as error:
            bad.record(path, error)
            continue
        wanted = 1 if video.pooling == "mean" else video.frames
        features[path] = found[[min(number, len(found) - 1) for number in range(wanted)]]
    return features, bad


def _places(sample: Sample, video: VideoCaptioner) -> tuple[Path, ...]:
    """A name for every image that is shown of a clip."""
    if video.pooling == "mean":
        return sample.images
    return tuple(Path(f"{sample.images[0]}#{number}") for number in range(video.frames))
