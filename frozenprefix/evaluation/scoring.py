"""From predicted texts to metrics, one scorer per task."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from frozenprefix.data.samples import Sample
from frozenprefix.evaluation.metrics.captions import CaptionReferences, caption_metrics
from frozenprefix.evaluation.metrics.vqa import by_group, exact_match, vqa_accuracy


@dataclass(frozen=True)
class Scores:
    """Metrics over all samples, and by question type where the data names types."""

    metrics: dict[str, float]
    groups: dict[str, dict[str, float]] = field(default_factory=dict)


Scorer = Callable[[Mapping[str, str]], Scores]


def caption_scorer(samples: Sequence[Sample]) -> Scorer:
    """BLEU, ROUGE-L, CIDEr-D and diversity against all captions of each sample, whose references are read once."""
    references = CaptionReferences({sample.id: list(sample.targets) for sample in samples})
    return lambda texts: Scores(caption_metrics(dict(texts), references).corpus)


def vqa_scorer(samples: Sequence[Sample]) -> Scorer:
    """VQA accuracy (soft where there are several human answers) and exact match, in all and by question type."""
    answers = {sample.id: list(sample.metadata.get("answers", sample.targets)) for sample in samples}
    types = {s.id: s.metadata["question_type"] for s in samples if "question_type" in s.metadata}

    def score(texts: Mapping[str, str]) -> Scores:
        accuracy, exact = vqa_accuracy(dict(texts), answers), exact_match(dict(texts), answers)
        metrics = {"accuracy": mean(accuracy.values()), "exact_match": mean(exact.values())}
        return Scores(metrics, {"accuracy": by_group(accuracy, types)} if types else {})

    return score


def mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)


SCORERS: dict[str, Callable[[Sequence[Sample]], Scorer]] = {"caption": caption_scorer, "vqa": vqa_scorer}
