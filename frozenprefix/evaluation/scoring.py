"""From predicted texts to metrics, one scorer per task."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from frozenprefix.data.samples import Sample
from frozenprefix.errors import AssetError, ConfigError
from frozenprefix.evaluation.bootstrap import Metric, bootstrap_interval
from frozenprefix.evaluation.metrics.captions import CaptionReferences, bleu_of_sums, caption_metrics
from frozenprefix.evaluation.metrics.clip_score import PROMPT, clip_score, ref_clip_score
from frozenprefix.evaluation.metrics.java import meteor, spice
from frozenprefix.evaluation.metrics.question_types import answer_type, question_type
from frozenprefix.evaluation.metrics.vqa import by_group, exact_match, vqa_accuracy
from frozenprefix.evaluation.metrics.wups import WordNet, wups
from frozenprefix.inference.embedding import Embedder

logger = logging.getLogger(__name__)
WUPS_AT = (0.9, 0.0)


@dataclass(frozen=True)
class Scores:
    """Scores of one prediction set.

    Attributes:
        metrics: over all samples.
        groups: metric → group (a question type) → mean of that group.
        per_sample: sample id → metric → score.
        statistics: name of a kind of statistics → sample id → values, for metrics that are not means over samples. A
            kind is a key of `STATISTICS`; or the name of a metric, whose values are [part, whole]: the metric is the
            sum of the parts over the sum of the wholes.
    """

    metrics: dict[str, float]
    groups: dict[str, dict[str, float]] = field(default_factory=dict)
    per_sample: dict[str, dict[str, float]] = field(default_factory=dict)
    statistics: dict[str, dict[str, list[int]]] = field(default_factory=dict)


#: Predictions by sample id, texts for most tasks → their scores.
Scorer = Callable[[Mapping[str, Any]], Scores]


def _bleu(name: str) -> Metric:
    def metric(sums: NDArray[np.float64]) -> NDArray[np.float64]:
        return bleu_of_sums(sums)[name]

    return metric


def _share(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    return sums[:, 0] / sums[:, 1]


#: Kind of statistics → the metrics computed from their sums.
STATISTICS: dict[str, dict[str, Metric]] = {"bleu": {name: _bleu(name) for name in (f"bleu_{n}" for n in range(1, 5))}}


def caption_scorer(samples: Sequence[Sample]) -> Scorer:
    """BLEU, ROUGE-L, CIDEr-D and diversity against all captions of each sample, whose references are read once."""
    references = CaptionReferences({sample.id: list(sample.targets) for sample in samples})

    def score(texts: Mapping[str, str]) -> Scores:
        scores = caption_metrics(dict(texts), references)
        return Scores(scores.corpus, per_sample=scores.per_image, statistics={"bleu": scores.bleu_statistics})

    return score


def meteor_scorer(samples: Sequence[Sample]) -> Scorer:
    """METEOR by Java; its score of all samples is not a mean over samples."""
    references = {sample.id: list(sample.targets) for sample in samples}
    return lambda texts: Scores({"meteor": meteor(texts, references).corpus})


def spice_scorer(samples: Sequence[Sample]) -> Scorer:
    """SPICE by Java and Stanford CoreNLP."""
    references = {sample.id: list(sample.targets) for sample in samples}

    def score(texts: Mapping[str, str]) -> Scores:
        scores = spice(texts, references)
        return Scores(
            {"spice": scores.corpus}, per_sample={key: {"spice": each} for key, each in scores.per_image.items()}
        )

    return score


def clip_scorer(embedder: Embedder, samples: Sequence[Sample]) -> Scorer:
    """CLIPScore and RefCLIPScore in the space of a contrastive model; see `metrics.clip_score`.

    Raises:
        ConfigError: for samples of several images.
    """
    several = [sample.id for sample in samples if len(sample.images) != 1]
    if several:
        raise ConfigError(f"clip_score: takes one image a sample; {len(several)} have several, first '{several[0]}'")
    images = embedder.embed_images([sample.images[0] for sample in samples])[1]
    references = [embedder.embed_texts([f"{PROMPT} {text}" for text in sample.targets]) for sample in samples]

    def score(texts: Mapping[str, str]) -> Scores:
        captions = embedder.embed_texts([f"{PROMPT} {texts[sample.id]}" for sample in samples])
        columns = {
            "clip_score": clip_score(images, captions), "ref_clip_score": ref_clip_score(images, captions, references)
        }  # fmt: skip
        return Scores(
            metrics={name: float(values.mean()) for name, values in columns.items()},
            per_sample={
                sample.id: {name: float(values[row]) for name, values in columns.items()}
                for row, sample in enumerate(samples)
            },
        )

    return score


def joined_scorer(scorers: Sequence[Scorer]) -> Scorer:
    """One scorer of several, whose metrics have different names.

    Example:
        >>> one, other = (lambda texts: Scores({"a": 1.0})), (lambda texts: Scores({"b": 2.0}))
        >>> joined_scorer([one, other])({}).metrics
        {'a': 1.0, 'b': 2.0}
    """

    def score(texts: Mapping[str, str]) -> Scores:
        joined = Scores({})
        for scores in (scorer(texts) for scorer in scorers):
            joined.metrics.update(scores.metrics)
            joined.statistics.update(scores.statistics)
            for key, values in scores.per_sample.items():
                joined.per_sample.setdefault(key, {}).update(values)
        return joined

    return score


def vqa_scorer(samples: Sequence[Sample]) -> Scorer:
    """VQA accuracy (soft where there are several human answers) and exact match, in all, by question type and by
    answer type: those that the data names, else as VQA v2 tells them apart. WUPS where WordNet is on this machine."""
    answers = {sample.id: list(sample.metadata.get("answers", sample.targets)) for sample in samples}
    types = {
        "accuracy": {s.id: str(s.metadata.get("question_type") or question_type(s.question or "")) for s in samples},
        "accuracy_by_answer_type": {
            s.id: str(s.metadata.get("answer_type") or answer_type(answers[s.id])) for s in samples
        },
    }

    taxonomy = lru_cache(_taxonomy)

    def score(texts: Mapping[str, str]) -> Scores:
        scores = {"accuracy": vqa_accuracy(dict(texts), answers), "exact_match": exact_match(dict(texts), answers)}
        for threshold in WUPS_AT if taxonomy() is not None else ():
            scores[f"wups_{threshold}"] = wups(dict(texts), answers, threshold=threshold, taxonomy=taxonomy())
        return Scores(
            metrics={name: mean(values.values()) for name, values in scores.items()},
            groups={name: by_group(scores["accuracy"], groups) for name, groups in types.items()},
            per_sample={key: {name: values[key] for name, values in scores.items()} for key in answers},
        )

    return score


def _taxonomy() -> WordNet | None:
    try:
        return WordNet()
    except AssetError as error:
        logger.info("WUPS is not computed: %s", error)
        return None


def mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)


def intervals(scores: Scores, clusters: Mapping[str, Hashable] | None = None, **options: int) -> dict[str, list[float]]:
    """95 % bootstrap intervals [low, high] of every metric that is a mean over samples or computed from statistics.

    Args:
        clusters: sample id → what is drawn as a whole, such as its image; see `bootstrap_interval`.
        options: `n` and `seed` of the bootstrap.
    """
    bounds: dict[str, list[float]] = {}
    for name in scores.metrics:
        rows, metric, ids = rows_of(name, scores.per_sample, scores.statistics)
        if ids:
            groups = None if clusters is None else [clusters[key] for key in ids]
            interval = bootstrap_interval(rows, metric, clusters=groups, **options)
            bounds[name] = [interval.low, interval.high]
    return bounds


def rows_of(
    name: str, per_sample: Mapping[str, Mapping[str, float]], statistics: Mapping[str, Mapping[str, Sequence[float]]]
) -> tuple[NDArray[np.float64], Metric | None, list[str]]:
    """Inputs of a metric's bootstrap: values per sample, the function of their sums (None: their mean), and the ids.

    Without ids for a metric that is not computed from samples, such as the number of different captions.
    """
    kinds: dict[str, dict[str, Metric]] = {**STATISTICS, name: {name: _share}}
    for kind, metrics in kinds.items():
        if name in metrics and statistics.get(kind):
            ids = list(statistics[kind])
            return np.array([statistics[kind][key] for key in ids], dtype=np.float64), metrics[name], ids
    ids = list(per_sample)
    if not ids or any(name not in per_sample[key] for key in ids):
        return np.empty(0), None, []
    return np.array([per_sample[key][name] for key in ids], dtype=np.float64), None, ids
