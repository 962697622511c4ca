"""Evaluate a checkpoint on a folder of data, or a model on samples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor
from transformers import AutoConfig

from frozenprefix.assets import check_checkpoint, opening_checkpoint
from frozenprefix.config import inference_precision
from frozenprefix.data.features import FeatureStorage, ImageFeatures
from frozenprefix.data.images import BadImages
from frozenprefix.data.samples import Sample
from frozenprefix.errors import ConfigError, DataError
from frozenprefix.evaluation.samples import (
    folder_samples,
    folder_training_samples,
    recipe_defaults,
    recipe_samples,
    recipe_storage,
)
from frozenprefix.evaluation.task import EvaluationOptions, EvaluationTask
from frozenprefix.evaluation.tasks import TASKS
from frozenprefix.inference.captioner import Captioner
from frozenprefix.models import auto  # noqa: F401 # makes its classes known to AutoConfig
from frozenprefix.models.checkpoint import checkpoint_config
from frozenprefix.utils import check_output, content_hash, safe_file_name
from frozenprefix.utils.processes import current_processes
from frozenprefix.version import __version__


def evaluate_checkpoint(
    checkpoint: str | Path,
    *,
    task: str,
    data: str | Path | None = None,
    split: str | None = None,
    limit: int | None = None,
    num_beams: int | None = None,
    predictions: Path | None = None,
    max_bad_share: float = 0.01,
    feature_cache: str | None = None,
    restart: bool = False,
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
    language_model: str | Path | None = None,
    precision: str = "auto",
    **extra: Any,
) -> dict[str, Any]:
    """Evaluate a checkpoint on a folder with captions.jsonl, qa.jsonl or another known format, or on its recipe's data.

    Under `torchrun` or `accelerate launch` the processes share the samples, and all return the same result. A killed
    evaluation resumes when it is started again with the same arguments.

    Args:
        task: one of `TASKS.names()`.
        data: the folder; the validation sources of the checkpoint's recipe when None, with its training sources for
            baselines.
        split: which rows of the folder; all when None.
        limit: evaluate the first `limit` images; the recipe's value when None.
        num_beams: the recipe's value when None, or else the task's default: 5 for captions and 1 for answers.
        predictions: JSONL file for every prediction, written before scoring; in the checkpoint's folder when None.
        feature_cache: "auto", "off" or a folder; the recipe's value when None.
        restart: discard the predictions of a killed evaluation.
        force: let `predictions` replace a file that no evaluation wrote.
        language_model, precision: as of `Captioner.from_pretrained`; all processes take the choice of the first.
        extra: options of this task only.

    Returns:
        The task's result (see `EvaluationTask.run`), with `source`: checkpoint, data, limit, precision and version.

    Raises:
        ConfigError: for an unknown task, beams for a task without beam search, a checkpoint without a recipe and no
            `data`, a `split` without `data`, or an evaluation that was begun with other settings.
        DataError: when there are no such samples, or too many images are bad.

    Example:
        >>> file = tmp_path / "predictions.jsonl"
        >>> result = evaluate_checkpoint(checkpoint, task="vqa", data=data_folder, limit=2, predictions=file)
        >>> result["n"], sorted(result["baselines"])
        (4, ['blind', 'shuffled'])
    """
    check_checkpoint(checkpoint)
    chosen, processes = TASKS.get(task), current_processes()
    if num_beams is not None and not chosen.takes_beams:
        raise ConfigError(f"--beams: got {num_beams}, which has no effect on task '{task}'; leave it out")
    defaults = recipe_defaults(checkpoint)
    limit = limit or defaults.limit
    asked = {name: value for name, value in extra.items() if name not in chosen.scoring}
    default = f"predictions_{_name(task, data, split, limit=limit, num_beams=num_beams, options=asked)}.jsonl"
    if num_beams is None and chosen.takes_beams:
        num_beams = defaults.num_beams
    samples, train = _samples(checkpoint, chosen.sample_task, data, split, limit, chosen.uses_train(extra))
    file = _predictions_file(predictions or Path(checkpoint) / default, force)
    model, precision = _load_model(chosen, checkpoint, processes, language_model, precision)
    storage = recipe_storage(checkpoint, model.encoder.fingerprint)
    options = EvaluationOptions(
        predictions=file,
        num_beams=num_beams,
        max_new_tokens=defaults.max_new_tokens,
        train_samples=train,
        max_bad_share=max_bad_share,
        features=storage if feature_cache is None else FeatureStorage(feature_cache, storage.feature_dtype),
        restart=restart,
        processes=processes,
        progress=progress,
        extra=extra,
    )
    result = chosen.run(model, samples, options)
    source = {"checkpoint": str(checkpoint), "data": None if data is None else str(data), "split": split}
    return {**result, "source": {**source, "limit": limit, "precision": precision, "frozenprefix": __version__}}


def _load_model(
    task: EvaluationTask, checkpoint: str | Path, processes: PartialState, language_model: Any, precision: str
) -> tuple[Any, str]:
    """The task's model and its precision, the same for all processes."""
    device = str(processes.device) if processes.num_processes > 1 else "cuda" if torch.cuda.is_available() else "cpu"
    with opening_checkpoint(checkpoint):
        config = checkpoint_config(AutoConfig, checkpoint, language_model=language_model)
    precision = gather_object([inference_precision(config, precision, device=device)])[0]
    return task.load(checkpoint, device=device, language_model=language_model, precision=precision), precision


def _samples(
    checkpoint: str | Path, name: str, data: str | Path | None, split: str | None, limit: int | None, with_train: bool
) -> tuple[list[Sample], list[Sample]]:
    """The samples to evaluate, and the training samples of the same task."""
    if data is not None:
        where, fix = f"{data} holds no {name} samples in split {split!r}", "check --task and --split"
        samples = folder_samples(data, name, split=split, limit=limit)
        train = folder_training_samples(data, name, split) if with_train else []
    elif split is None:
        where, fix = f"the recipe of {checkpoint} names no {name} samples for validation", "give a folder of data"
        samples = recipe_samples(checkpoint, name, "validation", limit=limit)
        train = recipe_samples(checkpoint, name, "train") if with_train else []
    else:
        raise ConfigError(f"--split: got {split!r} without --data; the recipe's validation sources name their own")
    if not samples:
        raise DataError(f"--data: {where}; {fix}")
    return samples, train


def _name(
    task: str,
    data: str | Path | None,
    split: str | None,
    *,
    limit: int | None,
    num_beams: int | None,
    options: Mapping[str, Any],
) -> str:
    """Name of an evaluation in the predictions' file name: all that was asked for and that predictions depend on."""
    if data is None:
        parts = ["recipe_validation"]
    else:
        folder = Path(data).resolve()
        # two data sets may be in folders with the same name
        parts = [f"{safe_file_name(folder.name, 40)}-{content_hash(str(folder))[:6]}", split or "all"]
    if limit is not None:
        parts.append(f"first{limit}")
    if num_beams is not None:
        parts.append(f"beams{num_beams}")
    others = {name: value for name, value in options.items() if name != "answering"}
    if others:
        parts.append(f"options-{content_hash(repr(sorted(others.items())))[:6]}")
    return "_".join([task, *([options["answering"]] if options.get("answering") else []), *parts])


def _predictions_file(path: Path, force: bool) -> Path:
    check_output(path, {"id", "images", "references", "model"}, force=force, option="--predictions")
    return path


def evaluate_samples(
    captioner: Captioner,
    samples: Sequence[Sample],
    *,
    predictions: Path,
    num_beams: int | None = None,
    max_new_tokens: int | None = None,
    train_samples: Sequence[Sample] = (),
    max_bad_share: float = 0.01,
    features: FeatureStorage | None = None,
    restart: bool = False,
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Evaluate samples of task "caption" or "vqa" that are loaded already; see `evaluate_captions`, `evaluate_vqa`.

    Args:
        features: where image features are kept; by default the user's cache.

    Example:
        >>> samples = folder_samples(data_folder, "vqa", limit=2)
        >>> result = evaluate_samples(captioner, samples, predictions=tmp_path / "predictions.jsonl")
        >>> result["task"], result["n"]
        ('vqa', 4)
    """
    options = EvaluationOptions(
        predictions=_predictions_file(predictions, force),
        num_beams=num_beams,
        max_new_tokens=max_new_tokens,
        train_samples=train_samples,
        max_bad_share=max_bad_share,
        features=features or FeatureStorage(),
        restart=restart,
        processes=current_processes(),
        progress=progress,
    )
    tasks = sorted({sample.task for sample in samples})
    if tasks not in (["caption"], ["vqa"]):
        raise ConfigError(f"evaluate one task at a time (caption, vqa), got {', '.join(tasks) or 'no sample'}")
    return TASKS.get(tasks[0]).run(captioner, samples, options)


def encode_samples(
    captioner: Captioner, samples: Iterable[Sample], features: FeatureStorage | None = None
) -> tuple[dict[Path, Tensor], BadImages]:
    """Image features float[N, D_enc] of every image that can be read, all in memory, and the images that cannot.

    Args:
        features: where features are kept; by default nowhere, and each image is encoded again.

    Example:
        >>> features, bad = encode_samples(captioner, [Sample("1", (image_path,), ("a red circle",))])
        >>> list(features) == [image_path], len(bad)
        (True, 0)
    """
    paths = list(dict.fromkeys(path for sample in samples for path in sample.images))
    images = ImageFeatures.from_encoder(captioner.encoder, paths, features or FeatureStorage("off"), max_bad_share=1.0)
    return {path: images([path])[0] for path in paths if path not in images.bad}, images.bad
