"""The runs that captioning, VQA and video share: the model, the blind LM, and the model with shuffled images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from frozenprefix.data.collation import prompt_of
from frozenprefix.data.features import ImageFeatures
from frozenprefix.data.samples import Sample, swap_images
from frozenprefix.evaluation.journal import Journal
from frozenprefix.evaluation.result import Predictions, predict_batches
from frozenprefix.evaluation.task import EvaluationOptions
from frozenprefix.inference.captioner import Captioner, batched
from frozenprefix.models.language_model.beam_search import NEUTRAL, WITHOUT_EFFECT

PROMPTS_AT_ONCE = 32  # about the same images
PROMPTS_PER_ROW = 4  # of a batch, on average: more take memory, and make progress coarse
# settings of the captioner or the evaluation
_SET_HERE = {"num_beams", "max_new_tokens", "max_length", "do_sample"}


@dataclass
class Asked:
    """Prompts about the same images, which the model reads once for all of them.

    Attributes:
        images: files in reading order; none for the blind LM.
        askers: prompt → (run, sample id) of all predictions that it gives.

    Example:
        >>> Asked((image_path,), {"<image>": [("model", "1"), ("shuffled", "2")]}).prompts
        ['<image>']
    """

    images: tuple[Path, ...]
    askers: dict[str, list[tuple[str, str]]] = field(default_factory=dict)

    @property
    def prompts(self) -> list[str]:
        return list(self.askers)


#: Predicts the texts of each prompt in a batch.
Answer = Callable[[Sequence[Asked]], Sequence[Sequence[str]]]


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
    list away, never its own. What is asked about the same images, in whichever run, is asked together, and the same
    prompt about them once.

    Args:
        answer: predicts the texts of a batch, such as `generating`.
        plain_samples: the same samples without retrieved captions in their prompts. "blind" is then asked with
            these, "shuffled" gets the captions of the other image, and a fourth run "retrieval_only" gets the sample's
            own captions with the other image.
    """
    plain = samples if plain_samples is None else plain_samples
    others = shuffled(samples)
    runs: dict[str, tuple[Sequence[Sample], Sequence[Sample | None]]] = {
        "model": (samples, samples),
        "blind": (plain, [None] * len(plain)),
        "shuffled": (samples, others),
    }
    if samples != plain:
        swapped = [replace(sample, prompt=other.prompt) for sample, other in zip(samples, others, strict=True)]
        runs |= {"shuffled": (swapped, others), "retrieval_only": (samples, others)}
    asked: dict[tuple[Path, ...], Asked] = {}
    for run, (asking, images_of) in runs.items():
        for sample, other in zip(asking, images_of, strict=True):
            if (run, sample.id) not in journal.known:
                images = () if other is None else other.images
                prompts = asked.setdefault(images, Asked(images)).askers
                prompts.setdefault(prompt_of(sample, captioner.processor), []).append((run, sample.id))
    batches = _batches(asked.values(), captioner.batch_size)
    predictions = predict_batches(journal, batches, partial(_predictions, answer), options, count=_num_askers)
    return {run: {sample.id: predictions[run][sample.id] for sample in samples} for run in runs}


def _batches(asked: Iterable[Asked], size: int) -> list[list[Asked]]:
    """Batches of up to `size` rows of similar length, and of a few times as many prompts.

    No batch mixes prompts with images and prompts without.
    """
    parts = []
    for each in asked:
        # neighbours in the alphabet share their first words, which are read once
        prompts = batched(sorted(each.prompts), PROMPTS_AT_ONCE)
        parts += [Asked(each.images, {prompt: each.askers[prompt] for prompt in some}) for some in prompts]
    parts.sort(key=lambda part: (len(part.images), sum(map(len, part.prompts))))
    batches: list[list[Asked]] = []
    held = 0  # prompts in the last batch
    for part in sorted(parts, key=lambda part: not part.images):
        last = batches[-1] if batches else []
        fits = 0 < len(last) < size and held + len(part.prompts) <= PROMPTS_PER_ROW * size
        if fits and bool(last[0].images) == bool(part.images):
            last.append(part)
            held += len(part.prompts)
        else:
            batches.append([part])
            held = len(part.prompts)
    return batches


def _num_askers(batch: Sequence[Asked]) -> int:
    return sum(len(askers) for asked in batch for askers in asked.askers.values())


def _predictions(answer: Answer, batch: Sequence[Asked]) -> dict[tuple[str, str], str]:
    """The text of everyone who asks in a batch: (run, sample id) → text."""
    return {
        asker: text
        for asked, texts in zip(batch, answer(batch), strict=True)
        for askers, text in zip(asked.askers.values(), texts, strict=True)
        for asker in askers
    }


def predict(
    captioner: Captioner, batch: Sequence[Asked], images: ImageFeatures, settings: Mapping[str, Any]
) -> list[list[str]]:
    """Generated texts for the prompts of a batch.

    Args:
        settings: options of transformers' `generate`.
    """
    groups = captioner.generate_groups([asked.prompts for asked in batch], features_of(batch, images), **settings)
    return [[generation.text for generation in group] for group in groups]


def generating(captioner: Captioner, images: ImageFeatures, settings: Mapping[str, Any]) -> Answer:
    """An `Answer` that generates texts; see `predict`."""
    return lambda batch: predict(captioner, batch, images, settings)


def features_of(batch: Sequence[Asked], images: ImageFeatures) -> Tensor | None:
    """Image features float[n, N, D_enc] of a batch, in reading order; None without images."""
    paths = [path for asked in batch for path in asked.images]
    return images(paths) if paths else None


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
