"""The runs that captioning, VQA and video share: the model, the blind LM, and the model with shuffled images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from frozenprefix.data.collation import prompt_of
from frozenprefix.data.features import ImageFeatures
from frozenprefix.data.samples import Sample, swap_images
from frozenprefix.evaluation.journal import Journal
from frozenprefix.evaluation.result import Predictions, predict_missing
from frozenprefix.evaluation.task import EvaluationOptions
from frozenprefix.inference.captioner import Captioner
from frozenprefix.models.language_model.beam_search import NEUTRAL, WITHOUT_EFFECT

#: A batch: each sample with the one whose images it gets, or None for no image.
Pairs = Sequence[tuple[Sample, Sample | None]]
Answer = Callable[[Pairs], dict[str, str]]
# settings of the captioner or the evaluation
_SET_HERE = {"num_beams", "max_new_tokens", "max_length", "do_sample"}


def predict_runs(
    captioner: Captioner,
    samples: Sequence[Sample],
    answer: Answer,
    journal: Journal,
    options: EvaluationOptions,
    *,
    plain_samples: Sequence[Sample] | None = None,
) -> Predictions:
    """Run → sample id → text, of all processes. Each process predicts its share of what the journal lacks.

    Runs: "model"; "blind", the LM with the prompt alone; "shuffled", the model with the image of a sample half the
    list away, never its own.

    Args:
        answer: predicts the texts of a batch by sample id, such as `predict`.
        plain_samples: the same samples without retrieved captions in their prompts. "blind" is then asked with
            these, "shuffled" gets the captions of the other image, and a fourth run "retrieval_only" gets the sample's
            own captions with the other image.
    """
    plain = samples if plain_samples is None else plain_samples
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
    todo = {}
    for name, (asked, images_of) in runs.items():
        # prompts of similar length in one batch need less padding
        pairs = zip(asked, images_of, strict=True)
        todo[name] = sorted(pairs, key=lambda pair: len(prompts[pair[0].id]))
    predictions = predict_missing(
        journal,
        todo,
        lambda _, batch: answer(batch),
        options,
        key=lambda pair: pair[0].id,
        batch_size=captioner.batch_size,
    )
    blind = predictions["blind"]
    predictions["blind"] = {sample.id: blind[first[prompts[sample.id]].id] for sample in samples}
    return {name: {sample.id: predictions[name][sample.id] for sample in samples} for name in runs}


def predict(captioner: Captioner, batch: Pairs, images: ImageFeatures, settings: Mapping[str, Any]) -> dict[str, str]:
    """Generated texts for a batch, by sample id.

    Args:
        settings: options of transformers' `generate`.
    """
    paths = images_of(batch)
    prompts = [prompt_of(sample, captioner.processor) for sample, _ in batch]
    texts = captioner.generate(prompts, images(paths) if paths else None, **settings)
    return {sample.id: generation.text for (sample, _), generation in zip(batch, texts, strict=True)}


def generating(captioner: Captioner, images: ImageFeatures, settings: Mapping[str, Any]) -> Answer:
    """An `Answer` that generates texts; see `predict`."""
    return lambda batch: predict(captioner, batch, images, settings)


def images_of(batch: Pairs) -> list[Any]:
    """Image files of a batch, in reading order."""
    return [path for _, other in batch if other is not None for path in other.images]


def lm_settings(captioner: Captioner) -> dict[str, Any]:
    """The LM's own generation settings (such as a repetition penalty), which apply to every generated text.

    Returns:
        `{"generation_config": …}` with what differs from transformers' defaults, or an empty dict.

    Example:
        >>> lm_settings(captioner)
        {}
    """
    config = captioner.model.generation_config.to_diff_dict()
    own = {
        name: value
        for name, value in config.items()
        if name not in _SET_HERE | WITHOUT_EFFECT and "token_id" not in name and NEUTRAL.get(name, ...) != value
    }
    return {"generation_config": own} if own else {}


def generate_settings(options: EvaluationOptions, *, num_beams: int, max_new_tokens: int) -> dict[str, int]:
    """`num_beams` and `max_new_tokens` of the options, else the task's own defaults.

    Example:
        >>> generate_settings(EvaluationOptions(tmp_path / "p.jsonl", num_beams=2), num_beams=5, max_new_tokens=30)
        {'num_beams': 2, 'max_new_tokens': 30}
    """
    return {
        "num_beams": options.num_beams or num_beams,
        "max_new_tokens": options.max_new_tokens or max_new_tokens,
    }


def shuffled(samples: Sequence[Sample]) -> list[Sample]:
    """For each sample the one whose images it gets instead; see `swap_images`.

    Raises:
        DataError: when there are not two different images.
    """
    first = {sample.images: sample for sample in reversed(samples)}
    swapped = swap_images([sample.images for sample in samples])
    others = []
    for sample in samples:
        images = swapped[sample.images]
        others.append(first.get(images) or replace(sample, images=images))
    return others
