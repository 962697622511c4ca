"""Captions and answers: what the model generates, beside what it says blind and of another's picture."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from frozenprefix.data.collation import prompt_of
from frozenprefix.data.features import PictureFeatures
from frozenprefix.data.retrieval import PictureLookup, picture_keys
from frozenprefix.data.samples import Sample, check_unique_ids
from frozenprefix.errors import ConfigError, DataError
from frozenprefix.evaluation.consensus import consensus_captions
from frozenprefix.evaluation.journal import Journal, header_of
from frozenprefix.evaluation.scoring import SCORERS, Scores, intervals
from frozenprefix.evaluation.tasks import EvaluationOptions, EvaluationTask
from frozenprefix.inference.captioner import Captioner, batched

DEFAULTS = {"caption": {"num_beams": 5, "max_new_tokens": 30}, "vqa": {"num_beams": 1, "max_new_tokens": 10}}
_PICTURES_AT_ONCE = 256

Texts = dict[str, dict[str, str]]


def evaluate_generation(captioner: Captioner, samples: Sequence[Sample], options: EvaluationOptions) -> dict[str, Any]:
    """Evaluate samples of task "caption" or "vqa", whose targets are the references.

    Runs: "model"; "blind", the LM with the prompt alone; "shuffled", the model shown the picture of a sample half the
    list away, never its own; and for captions "consensus" of the nearest of `options.train_samples`, where there are
    any. Every prediction is on disk before anything is scored.

    A model that was trained with retrieved captions gets them here too. They come from the picture: "blind" gets none,
    "shuffled" those of the picture that it is shown, and one more run, "retrieval_only", its own beside the picture of
    "shuffled".

    Returns:
        As `EvaluationTask.run` says, the same in every process, with `predictions_sha256` of the file.
    """
    task = _task_of(samples)
    if options.extra:
        raise ConfigError(f"task '{task}' has no option {', '.join(map(repr, options.extra))}")
    settings = dict(DEFAULTS[task])
    settings |= {"num_beams": options.num_beams} if options.num_beams else {}
    settings |= {"max_new_tokens": options.max_new_tokens} if options.max_new_tokens else {}
    pictures = open_features(captioner, samples, options)
    samples = [s for s in samples if not any(path in pictures.bad for path in s.images)]
    scorer = SCORERS[task](samples)
    asked = with_similar_captions(captioner, samples, pictures) if task == "caption" else samples
    header = header_of(captioner, asked, {"task": task, **settings})
    with Journal(options.predictions, header, processes=options.processes, restart=options.restart) as journal:
        texts = predict_runs(captioner, asked, pictures, settings, journal, options, blind=samples)
        if options.train_samples and task == "caption":
            texts |= consensus(captioner, samples, pictures, options)
        result = None
        if options.processes.is_main:
            write_predictions(options.predictions, samples, texts)
            scored = {name: scorer(made) for name, made in texts.items()}
            write_predictions(options.predictions, samples, texts, scored)
            result = _result(task, samples, scored, pictures, settings, options.predictions)
            journal.remove()
    return options.processes.gather([] if result is None else [result])[0]


CAPTION = EvaluationTask(evaluate_generation, sample_task="caption", uses_train=True)
VQA = EvaluationTask(evaluate_generation, sample_task="vqa")


def _task_of(samples: Sequence[Sample]) -> str:
    tasks = {sample.task for sample in samples}
    if len(tasks) != 1 or not tasks <= DEFAULTS.keys():
        raise ConfigError(f"evaluate one task at a time ({', '.join(DEFAULTS)}), got {', '.join(sorted(tasks))}")
    check_unique_ids(samples)
    return tasks.pop()


def _result(
    task: str,
    samples: Sequence[Sample],
    scored: Mapping[str, Scores],
    pictures: PictureFeatures,
    settings: dict[str, Any],
    predictions: Path,
) -> dict[str, Any]:
    return {
        "task": task,
        "metrics": scored["model"].metrics,
        "intervals": intervals(scored["model"], {sample.id: sample.images for sample in samples}),
        "baselines": {name: result.metrics for name, result in scored.items() if name != "model"},
        "n": len(samples),
        "groups": {name: result.groups for name, result in scored.items() if result.groups},
        "bad_pictures": pictures.bad.counts,
        "settings": settings,
        "predictions": str(predictions),
        "predictions_sha256": hashlib.sha256(predictions.read_bytes()).hexdigest(),
    }


def open_features(captioner: Captioner, samples: Sequence[Sample], options: EvaluationOptions) -> PictureFeatures:
    """The features of all pictures of `samples`, from the feature cache where there is one."""
    return PictureFeatures.of(
        captioner.model,
        captioner.processor,
        [path for sample in samples for path in sample.images],
        options.features,
        max_bad_share=options.max_bad_share,
        processes=options.processes,
    )


def predict_runs(
    captioner: Captioner,
    samples: Sequence[Sample],
    pictures: PictureFeatures,
    settings: Mapping[str, Any],
    journal: Journal,
    options: EvaluationOptions,
    *,
    blind: Sequence[Sample] | None = None,
) -> Texts:
    """Run → sample id → text, of all processes. Each process predicts its share of what the journal does not have.

    Args:
        blind: the same samples, as the blind LM is asked: without anything in the prompt that comes from the picture.
    """
    plain = samples if blind is None else blind
    prompts = {sample.id: prompt_of(sample, captioner.processor) for sample in plain}
    # without a picture, equal prompts get equal texts: each is asked once
    first = {prompts[sample.id]: sample for sample in reversed(plain)}
    others = shuffled(samples)
    runs: dict[str, tuple[Sequence[Sample], Sequence[Sample | None]]] = {
        "model": (samples, samples),
        "blind": (list(first.values()), [None] * len(first)),
        "shuffled": (samples, others),
    }
    if samples != plain:
        swapped = [replace(sample, prompt=other.prompt) for sample, other in zip(samples, others, strict=True)]
        runs |= {"shuffled": (swapped, others), "retrieval_only": (samples, others)}
    share = slice(options.processes.rank, None, options.processes.count)
    todo = {}
    for name, (asked, shown) in runs.items():
        left = [pair for pair in zip(asked, shown, strict=True) if (name, pair[0].id) not in journal.made]
        # prompts of like length together save padding
        left.sort(key=lambda pair: len(pair[0].question or ""))
        todo[name] = list(batched(left, captioner.batch_size))[share]
    done = len(journal.made)
    total = done + sum(len(batch) for batches in todo.values() for batch in batches)
    for name, batches in todo.items():
        for batch in batches:
            journal.add(name, predict(captioner, batch, pictures, settings))
            done += len(batch)
            if options.progress is not None:
                options.progress(done, total)
    made = journal.gather()
    asked_as = {"blind": {sample.id: first[prompts[sample.id]].id for sample in samples}}
    return {
        name: {sample.id: made[name][asked_as.get(name, {}).get(sample.id, sample.id)] for sample in samples}
        for name in runs
    }


def predict(
    captioner: Captioner,
    batch: Sequence[tuple[Sample, Sample | None]],
    pictures: PictureFeatures,
    settings: Mapping[str, Any],
) -> dict[str, str]:
    """Texts for a batch of (sample, the sample whose pictures are shown, None for no picture), by the sample's id."""
    shown = [path for _, other in batch if other is not None for path in other.images]
    made = captioner.generate(
        [prompt_of(sample, captioner.processor) for sample, _ in batch],
        image_features=pictures(shown) if shown else None,
        **settings,
    )
    return {sample.id: generation.text for (sample, _), generation in zip(batch, made, strict=True)}


def with_similar_captions(
    captioner: Captioner, samples: Sequence[Sample], pictures: PictureFeatures
) -> Sequence[Sample]:
    """The samples with the prompts that the model was trained with, when captions of similar pictures stand there."""
    if captioner.retriever is None:
        return samples
    lookup = PictureLookup(partial(picture_keys, captioner.model.vision_encoder), pictures)
    return captioner.retriever.with_prompts(samples, lookup, prompt=captioner.processor.prompts["caption"])


def consensus(
    captioner: Captioner, samples: Sequence[Sample], pictures: PictureFeatures, options: EvaluationOptions
) -> Texts:
    """The caption of the nearest training pictures that agrees best with their others: what no training reaches.

    All processes fill the feature cache; the main one retrieves, and gives the others nothing.
    """
    if options.features.feature_cache == "off" and not options.processes.is_main:
        return {}
    known = open_features(captioner, options.train_samples, options)
    if not options.processes.is_main:
        return {}
    train = [s for s in options.train_samples if not any(path in known.bad for path in s.images)]
    texts = consensus_captions(_pooled(samples, pictures), _pooled(train, known), [list(s.targets) for s in train])
    return {"consensus": {sample.id: text for sample, text in zip(samples, texts, strict=True)}}


def _pooled(samples: Iterable[Sample], pictures: PictureFeatures) -> np.ndarray:
    """float[samples, D]: the mean over the feature vectors of each sample's first picture."""
    paths = batched((sample.images[0] for sample in samples), _PICTURES_AT_ONCE)
    return np.concatenate([pictures(batch).mean(dim=1).numpy() for batch in paths])


def shuffled(samples: Sequence[Sample]) -> list[Sample]:
    """For each sample the one whose pictures it gets instead: half the pictures further on.

    Raises:
        DataError: when there are not two different pictures.
    """
    pictures = list(dict.fromkeys(sample.images for sample in samples))
    if len(pictures) < 2:
        raise DataError("evaluation needs at least 2 different pictures, for the shuffled baseline")
    other = {images: pictures[(i + len(pictures) // 2) % len(pictures)] for i, images in enumerate(pictures)}
    first = {sample.images: sample for sample in reversed(samples)}
    return [first[other[sample.images]] for sample in samples]


def write_predictions(
    path: Path, samples: Sequence[Sample], texts: Texts, scored: Mapping[str, Scores] | None = None
) -> None:
    """One JSON object per sample: id, pictures, question, references, each run's text; and when they are scored,
    `scores` (run → metric → score of this sample) and `statistics` of the model's run."""
    rows = []
    for sample in samples:
        row: dict[str, Any] = {
            "id": sample.id,
            "images": [str(image) for image in sample.images],
            "question": sample.question,
            "references": list(sample.targets),
            **{name: made[sample.id] for name, made in texts.items()},
        }
        if scored is not None:
            row["scores"] = {name: each.per_sample.get(sample.id, {}) for name, each in scored.items()}
            row["statistics"] = {kind: of[sample.id] for kind, of in scored["model"].statistics.items()}
        rows.append(json.dumps(row, ensure_ascii=False) + "\n")
    aside = path.with_name(f"{path.name}.new")
    aside.write_text("".join(rows), encoding="utf-8")
    aside.replace(path)
