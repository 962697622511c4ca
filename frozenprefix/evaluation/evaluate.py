"""Score a model on captions or questions, with the blind LM's and the shuffled pictures' scores beside it."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from frozenprefix.data.collation import prompt_of
from frozenprefix.data.images import BadPictures, load_image
from frozenprefix.data.samples import Sample, check_unique_ids
from frozenprefix.data.sources import detect_sources, load_source
from frozenprefix.errors import BadImageError, ConfigError, DataError
from frozenprefix.evaluation.consensus import consensus_captions
from frozenprefix.evaluation.scoring import SCORERS, Scores
from frozenprefix.inference.captioner import Captioner, batched

logger = logging.getLogger(__name__)
DEFAULTS = {"caption": {"num_beams": 5, "max_new_tokens": 30}, "vqa": {"num_beams": 1, "max_new_tokens": 10}}


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
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Evaluate a checkpoint on a folder with captions.jsonl or qa.jsonl.

    Args:
        task: "caption" or "vqa".
        split: which rows; all when None. limit: the first so many pictures.
        num_beams: 5 for captions and 1 for answers when None.
        predictions: JSONL file that gets every prediction before anything is scored; beside the checkpoint when None.

    Returns:
        `{"task", "metrics", "baselines", "n", "groups", "bad_pictures", "settings", "predictions"}`. Baselines are
        "blind" and "shuffled", and for captions "consensus", where the folder has a train split too.
    """
    samples = folder_samples(data, task, split=split, limit=limit)
    if not samples:
        raise DataError(f"--data: {data} holds no {task} samples in split {split!r}; check --task and --split")
    captioner = Captioner.from_pretrained(checkpoint)
    predictions = predictions or Path(checkpoint) / f"predictions_{task}_{split or 'all'}.jsonl"
    return evaluate_samples(
        captioner,
        samples,
        num_beams=num_beams,
        predictions=predictions,
        train_samples=training_samples(data, task, split),
        max_bad_share=max_bad_share,
        progress=progress,
    )


def folder_samples(data: str | Path, task: str, **options: Any) -> list[Sample]:
    """The samples of one task in a folder; `options` are those of its data source."""
    sources = [{**source, **options} for source in detect_sources(data)]
    if task == "caption":
        sources = [{**source, "captions": True} if source["type"] == "easy_vqa" else source for source in sources]
    return [sample for source in sources for sample in load_source(source) if sample.task == task]


def training_samples(data: str | Path, task: str, split: str | None) -> list[Sample]:
    """The folder's own training split, for the consensus baseline; nothing when that is what is evaluated."""
    if task != "caption" or split in (None, "train"):
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
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Evaluate samples of one task, whose targets are the references; see `evaluate_checkpoint`.

    Shuffled pictures: sample i gets the pictures of a sample half the list away, never its own. Captions are also
    compared with the consensus caption of the nearest of `train_samples`, where there are any.
    """
    tasks = {sample.task for sample in samples}
    if len(tasks) != 1 or not tasks <= DEFAULTS.keys():
        raise ConfigError(f"evaluate one task at a time ({', '.join(DEFAULTS)}), got {', '.join(sorted(tasks))}")
    check_unique_ids(samples)
    task = tasks.pop()
    settings = dict(DEFAULTS[task])
    settings |= {"num_beams": num_beams} if num_beams else {}
    settings |= {"max_new_tokens": max_new_tokens} if max_new_tokens else {}
    features, bad = encode_samples(captioner, samples)
    bad.check(len({p for s in samples for p in s.images}), max_bad_share)
    samples = [s for s in samples if all(path in features for path in s.images)]
    texts = predict_runs(captioner, samples, features, settings, progress)
    if train_samples and task == "caption":
        texts["consensus"] = consensus(captioner, samples, features, train_samples)
    write_predictions(predictions, samples, texts)
    scorer = SCORERS[task](samples)
    scored: dict[str, Scores] = {name: scorer(made) for name, made in texts.items()}
    return {
        "task": task,
        "metrics": scored["model"].metrics,
        "baselines": {name: result.metrics for name, result in scored.items() if name != "model"},
        "n": len(samples),
        "groups": {name: result.groups for name, result in scored.items() if result.groups},
        "bad_pictures": bad.counts,
        "settings": settings,
        "predictions": str(predictions),
    }


def predict_runs(
    captioner: Captioner,
    samples: list[Sample],
    features: dict[Path, Tensor],
    settings: dict[str, Any],
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, dict[str, str]]:
    """Texts by sample id: of the model, of the blind LM, and of the model with shuffled pictures."""
    prompts = {sample.id: prompt_of(sample, captioner.processor) for sample in samples}
    # without a picture, equal prompts get equal texts: each is asked once
    first = {prompts[sample.id]: sample for sample in reversed(samples)}
    runs: dict[str, tuple[list[Sample], list[Sample] | None]] = {
        "model": (samples, samples),
        "blind": (list(first.values()), None),
        "shuffled": (samples, shuffled(samples)),
    }
    done, total = 0, sum(len(asked) for asked, _ in runs.values())
    texts: dict[str, dict[str, str]] = {}
    for name, (asked, shown) in runs.items():
        texts[name] = {}
        for batch in by_prompt_length(captioner, asked, shown):
            texts[name] |= _predict(captioner, batch, features, settings)
            done += len(batch)
            if progress is not None:
                progress(done, total)
    texts["blind"] = {sample.id: texts["blind"][first[prompts[sample.id]].id] for sample in samples}
    return texts


def consensus(
    captioner: Captioner, samples: Sequence[Sample], features: dict[Path, Tensor], train_samples: Sequence[Sample]
) -> dict[str, str]:
    """The caption of the nearest training pictures that agrees best with their others: what no training reaches."""
    known, _ = encode_samples(captioner, train_samples)
    train = [sample for sample in train_samples if all(path in known for path in sample.images)]

    def pooled(listed: Sequence[Sample], encoded: dict[Path, Tensor]) -> np.ndarray:
        return torch.stack([encoded[sample.images[0]].mean(dim=0) for sample in listed]).numpy()

    texts = consensus_captions(pooled(samples, features), pooled(train, known), [list(s.targets) for s in train])
    return {sample.id: text for sample, text in zip(samples, texts, strict=True)}


@torch.inference_mode()
def encode_samples(captioner: Captioner, samples: Iterable[Sample]) -> tuple[dict[Path, Tensor], BadPictures]:
    """Image features float[N, D_enc] of every picture that can be read, and the others."""
    features: dict[Path, Tensor] = {}
    bad = BadPictures()
    model, processor = captioner.model, captioner.processor
    for paths in batched(dict.fromkeys(path for sample in samples for path in sample.images), captioner.batch_size):
        images = {}
        for path in paths:
            try:
                images[path] = load_image(path)
            except BadImageError as error:
                bad.record(path, error)
        if images:
            pixel_values = processor.image_processor(list(images.values()), return_tensors="pt")["pixel_values"]
            encoded = model.encode(pixel_values.to(model.device))
            features |= dict(zip(images, encoded.float().cpu(), strict=True))
    return features, bad


def shuffled(samples: Sequence[Sample]) -> list[Sample]:
    """For each sample the one whose pictures it gets instead: half the pictures further on."""
    pictures = list(dict.fromkeys(sample.images for sample in samples))
    if len(pictures) < 2:
        raise DataError("evaluation needs at least 2 different pictures, for the shuffled baseline")
    other = {images: pictures[(i + len(pictures) // 2) % len(pictures)] for i, images in enumerate(pictures)}
    first = {sample.images: sample for sample in reversed(samples)}
    return [first[other[sample.images]] for sample in samples]


def by_prompt_length(
    captioner: Captioner, samples: Sequence[Sample], shown: Sequence[Sample] | None
) -> Iterable[list[tuple[Sample, Sample | None]]]:
    """Batches of (sample, sample whose pictures are shown), prompts of like length together to save padding."""
    others: Sequence[Sample | None] = shown or [None] * len(samples)
    pairs = list(zip(samples, others, strict=True))
    return batched(sorted(pairs, key=lambda pair: len(pair[0].question or "")), captioner.batch_size)


def _predict(
    captioner: Captioner,
    batch: list[tuple[Sample, Sample | None]],
    features: dict[Path, Tensor],
    settings: dict[str, Any],
) -> dict[str, str]:
    shown = [features[path] for _, other in batch if other is not None for path in other.images]
    made = captioner.generate(
        [prompt_of(sample, captioner.processor) for sample, _ in batch],
        image_features=torch.stack(shown) if shown else None,
        **settings,
    )
    return {sample.id: generation.text for (sample, _), generation in zip(batch, made, strict=True)}


def write_predictions(path: Path, samples: Sequence[Sample], texts: dict[str, dict[str, str]]) -> None:
    """One JSON object per sample: id, pictures, question, references, and each run's text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for sample in samples:
            row = {
                "id": sample.id,
                "images": [str(image) for image in sample.images],
                "question": sample.question,
                "references": list(sample.targets),
                **{name: made[sample.id] for name, made in texts.items()},
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
