"""Captions and answers: what the model writes or chooses, beside what it says blind and of another's image."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from frozenprefix.data.caption_retriever import ImageLookup, image_keys
from frozenprefix.data.collation import prompt_of
from frozenprefix.data.features import ImageFeatures
from frozenprefix.data.samples import Sample, check_unique_ids, swap_images
from frozenprefix.errors import ConfigError
from frozenprefix.evaluation.candidates import CANDIDATES, candidate_answers, choose
from frozenprefix.evaluation.consensus import consensus_captions
from frozenprefix.evaluation.journal import Journal, digest, header_of
from frozenprefix.evaluation.result import Evaluated, Predictions, evaluate_runs, predict_missing
from frozenprefix.evaluation.scoring import SCORERS
from frozenprefix.evaluation.tasks.registry import EvaluationOptions, EvaluationTask, check_options
from frozenprefix.inference.captioner import Captioner

OPTIONS = {"caption": (), "vqa": ("answering", "candidates")}
DEFAULTS = {"caption": {"num_beams": 5, "max_new_tokens": 30}, "vqa": {"num_beams": 1, "max_new_tokens": 10}}

#: A batch: samples, each with the one whose images are shown, or None for no image.
Pairs = Sequence[tuple[Sample, Sample | None]]


def evaluate_generation(captioner: Captioner, samples: Sequence[Sample], options: EvaluationOptions) -> dict[str, Any]:
    """Evaluate samples of task "caption" or "vqa", whose targets are the references.

    Runs: "model"; "blind", the LM with the prompt alone; "shuffled", the model shown the image of a sample half the
    list away, never its own; and for captions "consensus" of the nearest of `options.train_samples`, where there are
    any. Every prediction is on disk before anything is scored.

    A model that was trained with retrieved captions gets them here too. They come from the image: "blind" gets none,
    "shuffled" those of the image that it is shown, and one more run, "retrieval_only", its own beside the image of
    "shuffled".

    Args:
        options: for "vqa" its `extra` takes `answering`: "generate" (the default) lets the LM write, "choose" takes the
            likeliest of `candidates` (the sum over an answer's tokens and its end): how many of the most common targets
            of `options.train_samples` (100), or a list of answers.

    Returns:
        As `EvaluationTask.run` says.

    Raises:
        ConfigError: for samples of several tasks, or an option that the task or the way of answering does not have.
        DataError: for ids that occur twice, or no training samples to choose answers from.
    """
    task = _task_of(samples)
    check_options(task, options.extra, OPTIONS[task])
    candidates, generate = _candidates(options), generate_settings(task, options)
    settings: dict[str, Any] = generate if task == "caption" else {"answering": "generate", **generate}
    if candidates is not None:
        settings = {"answering": "choose", "candidates": len(candidates)}
    images = open_features(captioner, samples, options)
    samples = [s for s in samples if not any(path in images.bad for path in s.images)]
    asked = with_similar_captions(captioner, samples, images) if task == "caption" else samples

    def answer(batch: Pairs) -> dict[str, str]:
        if candidates is not None:
            return choose(captioner, batch, images, candidates)
        return predict(captioner, batch, images, generate)

    def predict_all(journal: Journal) -> Predictions:
        made = predict_runs(captioner, asked, answer, journal, options, blind=samples)
        if options.train_samples and task == "caption":
            made |= consensus(captioner, samples, images, options)
        return made

    listed = None if candidates is None else digest(candidates)
    header = header_of(captioner, asked, {"task": task, **settings, "list of candidates": listed})
    what = Evaluated(task, samples, SCORERS[task](samples), settings, images.bad)
    return evaluate_runs(what, predict_all, header, options)


def _chooses(extra: Mapping[str, Any]) -> bool:
    """Whether answers are chosen from those of the training samples."""
    return extra.get("answering") == "choose" and not isinstance(extra.get("candidates"), list | tuple)


CAPTION = EvaluationTask(evaluate_generation, sample_task="caption", uses_train=lambda extra: True, takes_beams=True)
VQA = EvaluationTask(evaluate_generation, sample_task="vqa", uses_train=_chooses, takes_beams=True)


def generate_settings(task: str, options: EvaluationOptions) -> dict[str, int]:
    """`num_beams` and `max_new_tokens`: what was asked for, else the task's own."""
    settings = dict(DEFAULTS[task])
    settings |= {"num_beams": options.num_beams} if options.num_beams else {}
    settings |= {"max_new_tokens": options.max_new_tokens} if options.max_new_tokens else {}
    return settings


def _candidates(options: EvaluationOptions) -> list[str] | None:
    """The answers to choose from, None when the LM writes them."""
    answering = options.extra.get("answering", "generate")
    if answering not in ("generate", "choose"):
        raise ConfigError(f"answering: got {answering!r}, expected 'generate' or 'choose'")
    if answering == "generate":
        if "candidates" in options.extra:
            raise ConfigError("candidates: nothing is chosen with answering='generate'; set answering=choose")
        return None
    for name in ("num_beams", "max_new_tokens"):
        if getattr(options, name) is not None:
            raise ConfigError(f"{name}: nothing is generated with answering='choose'; leave it out")
    return candidate_answers(options.extra.get("candidates", CANDIDATES), options.train_samples)


def _task_of(samples: Sequence[Sample]) -> str:
    tasks = {sample.task for sample in samples}
    if len(tasks) != 1 or not tasks <= DEFAULTS.keys():
        raise ConfigError(f"evaluate one task at a time ({', '.join(DEFAULTS)}), got {', '.join(sorted(tasks))}")
    check_unique_ids(samples)
    return tasks.pop()


def open_features(captioner: Captioner, samples: Sequence[Sample], options: EvaluationOptions) -> ImageFeatures:
    """The features of all images of `samples`, from the feature cache where there is one."""
    return ImageFeatures.from_encoder(
        captioner.encoder,
        [path for sample in samples for path in sample.images],
        options.features,
        max_bad_share=options.max_bad_share,
        processes=options.processes,
    )


def predict_runs(
    captioner: Captioner,
    samples: Sequence[Sample],
    answer: Callable[[Pairs], dict[str, str]],
    journal: Journal,
    options: EvaluationOptions,
    *,
    blind: Sequence[Sample] | None = None,
) -> Predictions:
    """Run → sample id → text, of all processes. Each process predicts its share of what the journal does not have.

    Args:
        answer: gives the texts of a batch, such as `predict`.
        blind: the same samples, as the blind LM is asked: without anything in the prompt that comes from the image.
    """
    plain = samples if blind is None else blind
    prompts = {sample.id: prompt_of(sample, captioner.processor) for sample in plain}
    # without an image, equal prompts get equal texts: each is asked once
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
    # prompts of like length together save padding
    todo = {
        name: sorted(zip(asked, shown, strict=True), key=lambda pair: len(prompts[pair[0].id]))
        for name, (asked, shown) in runs.items()
    }
    made = predict_missing(
        journal,
        todo,
        lambda _, batch: answer(batch),
        options,
        key=lambda pair: pair[0].id,
        batch_size=captioner.batch_size,
    )
    asked_as = {"blind": {sample.id: first[prompts[sample.id]].id for sample in samples}}
    return {
        name: {sample.id: made[name][asked_as.get(name, {}).get(sample.id, sample.id)] for sample in samples}
        for name in runs
    }


def predict(captioner: Captioner, batch: Pairs, images: ImageFeatures, settings: Mapping[str, Any]) -> dict[str, str]:
    """Generated texts for a batch, by the sample's id."""
    shown = [path for _, other in batch if other is not None for path in other.images]
    made = captioner.generate(
        [prompt_of(sample, captioner.processor) for sample, _ in batch],
        images=images(shown) if shown else None,
        **settings,
    )
    return {sample.id: generation.text for (sample, _), generation in zip(batch, made, strict=True)}


def with_similar_captions(captioner: Captioner, samples: Sequence[Sample], images: ImageFeatures) -> Sequence[Sample]:
    """The samples with the prompts that the model was trained with, when captions of similar images stand there."""
    if captioner.retriever is None:
        return samples
    lookup = ImageLookup(partial(image_keys, captioner.model.vision_encoder), images)
    return captioner.retriever.with_prompts(samples, lookup, prompt=captioner.processor.prompts["caption"])


def consensus(
    captioner: Captioner, samples: Sequence[Sample], images: ImageFeatures, options: EvaluationOptions
) -> Predictions:
    """The caption of the nearest training images that agrees best with their others: what no training reaches.

    All processes fill the feature cache; the main one retrieves, and gives the others nothing.
    """
    if options.features.feature_cache == "off" and not options.processes.is_main:
        return {}
    known = open_features(captioner, options.train_samples, options)
    if not options.processes.is_main:
        return {}
    train = [s for s in options.train_samples if not any(path in known.bad for path in s.images)]
    texts = consensus_captions(_pooled(samples, images), _pooled(train, known), [list(s.targets) for s in train])
    return {"consensus": {sample.id: text for sample, text in zip(samples, texts, strict=True)}}


def _pooled(samples: Iterable[Sample], images: ImageFeatures) -> np.ndarray:
    """float[samples, D]: the mean over the feature vectors of each sample's images."""
    return np.stack([images(list(sample.images)).mean(dim=(0, 1)).numpy() for sample in samples])


def shuffled(samples: Sequence[Sample]) -> list[Sample]:
    """For each sample the one whose images it gets instead, see `swap_images`.

    Raises:
        DataError: when there are not two different images.
    """
    first = {sample.images: sample for sample in reversed(samples)}
    swapped = swap_images([sample.images for sample in samples])
    others = ((sample, swapped[sample.images]) for sample in samples)
    return [first[images] if images in first else replace(sample, images=images) for sample, images in others]
