"""Evaluate a checkpoint on a folder of data, or a model on samples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from frozenprefix import __version__
from frozenprefix.data.features import FeatureOptions, FeatureStorage, PictureFeatures
from frozenprefix.data.images import BadPictures
from frozenprefix.data.processes import Processes
from frozenprefix.data.samples import Sample
from frozenprefix.data.sources import detect_sources, load_source
from frozenprefix.errors import DataError
from frozenprefix.evaluation.generation import evaluate_generation, shuffled, write_predictions
from frozenprefix.evaluation.tasks import TASKS, EvaluationOptions
from frozenprefix.inference.captioner import Captioner

__all__ = [
    "encode_samples",
    "evaluate_checkpoint",
    "evaluate_samples",
    "folder_samples",
    "shuffled",
    "training_samples",
    "write_predictions",
]

#: (type of source, task) → what it must be asked for, or it gives no sample of that task.
_ASKED_FOR: dict[tuple[str, str], dict[str, Any]] = {
    ("easy_vqa", "caption"): {"captions": True},
    ("easy_vqa", "classification"): {"classes": "color shape"},
    ("image_folder", "classification"): {"labels": True},
}


def evaluate_checkpoint(
    checkpoint: str | Path,
    *,
    task: str,
    data: str | Path,
    split: str | None = None,
    limit: int | None = None,
    num_beams: int | None = None,
    predictions: Path | None = None,
    max_bad_share: float = 0.01,
    feature_cache: str | None = None,
    restart: bool = False,
    progress: Callable[[int, int], None] | None = None,
    **extra: Any,
) -> dict[str, Any]:
    """Evaluate a checkpoint on a folder with captions.jsonl, qa.jsonl or another known format.

    Under `torchrun` or `accelerate launch` the processes share the samples, and all return the same result. An
    evaluation that was killed goes on where it was when it is started again in the same way.

    Args:
        task: one of `TASKS.names()`.
        split: which rows; all when None. limit: the first so many pictures.
        num_beams: the task's own number when None: 5 for captions and 1 for answers.
        predictions: JSONL file that gets every prediction before anything is scored; beside the checkpoint when None.
        feature_cache: "auto", "off" or a folder; what the checkpoint's recipe says when None.
        restart: throw away what a killed evaluation has left.
        extra: options of this task only.

    Returns:
        The task's result (see `EvaluationTask.run`), with `source`: what was evaluated, with which version.

    Raises:
        ConfigError: for an unknown task, or an evaluation that was begun with other settings.
        DataError: when the folder has no such samples, or too many pictures are bad.
    """
    chosen, processes = TASKS.get(task), Processes.current()
    samples = folder_samples(data, chosen.sample_task, split=split, limit=limit)
    if not samples:
        raise DataError(
            f"--data: {data} holds no {chosen.sample_task} samples in split {split!r}; check --task and --split"
        )
    storage = FeatureStorage.of_checkpoint(checkpoint)
    options = EvaluationOptions(
        predictions=predictions or Path(checkpoint) / f"predictions_{task}_{split or 'all'}.jsonl",
        num_beams=num_beams,
        train_samples=training_samples(data, chosen.sample_task, split) if chosen.uses_train else [],
        max_bad_share=max_bad_share,
        features=storage if feature_cache is None else FeatureStorage(feature_cache, storage.feature_dtype),
        restart=restart,
        processes=processes,
        progress=progress,
        extra=extra,
    )
    result = chosen.run(chosen.load(checkpoint, _device(processes)), samples, options)
    source = {"checkpoint": str(checkpoint), "data": str(data), "split": split, "limit": limit}
    return {**result, "source": {**source, "frozenprefix": __version__}}


def folder_samples(data: str | Path, task: str, **options: Any) -> list[Sample]:
    """The samples of one task in a folder; `options` are those of its data source."""
    sources = [{**source, **options} for source in detect_sources(data)]
    for source in sources:
        source |= _ASKED_FOR.get((source["type"], task), {})
        if source["type"] == "image_folder" and source.get("split") is not None:
            source["split_folders"] = True
    return [sample for source in sources for sample in load_source(source) if sample.task == task]


def training_samples(data: str | Path, task: str, split: str | None) -> list[Sample]:
    """The folder's own training split, for baselines; nothing when that is what is evaluated."""
    if split in (None, "train"):
        return []
    return [sample for sample in folder_samples(data, task) if sample.split == "train"]


def evaluate_samples(
    captioner: Captioner,
    samples: Sequence[Sample],
    *,
    predictions: Path,
    num_beams: int | None = None,
    max_new_tokens: int | None = None,
    train_samples: Sequence[Sample] = (),
    max_bad_share: float = 0.01,
    features: FeatureOptions | None = None,
    restart: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Evaluate samples of task "caption" or "vqa" that are there already; see `evaluate_generation`.

    Args:
        features: where image features are kept; the user's cache when not given.
    """
    options = EvaluationOptions(
        predictions=predictions,
        num_beams=num_beams,
        max_new_tokens=max_new_tokens,
        train_samples=train_samples,
        max_bad_share=max_bad_share,
        features=features or FeatureStorage(),
        restart=restart,
        processes=Processes.current(),
        progress=progress,
    )
    return evaluate_generation(captioner, samples, options)


def encode_samples(
    captioner: Captioner, samples: Iterable[Sample], features: FeatureOptions | None = None
) -> tuple[dict[Path, Tensor], BadPictures]:
    """Image features float[N, D_enc] of every picture that can be read, and the others. All are held in memory.

    Args:
        features: where features are kept; each picture is encoded anew when not given.
    """
    paths = list(dict.fromkeys(path for sample in samples for path in sample.images))
    pictures = PictureFeatures.of(
        captioner.model, captioner.processor, paths, features or FeatureStorage("off"), max_bad_share=1.0
    )
    return {path: pictures([path])[0] for path in paths if path not in pictures.bad}, pictures.bad


def _device(processes: Processes) -> str | None:
    """The accelerator of this process, when several share a machine."""
    if processes.count == 1:
        return None
    from accelerate import PartialState

    return str(PartialState().device)
