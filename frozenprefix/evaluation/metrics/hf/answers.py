"""Metrics of answers and labels."""

from __future__ import annotations

from typing import Any, ClassVar

from datasets import Features, Value

from frozenprefix.evaluation.metrics.classification import classification_report
from frozenprefix.evaluation.metrics.hf.base import TEXT, TEXTS, OfflineMetric, mean, numbered
from frozenprefix.evaluation.metrics.vqa import exact_match, vqa_accuracy
from frozenprefix.evaluation.metrics.wups import Taxonomy, wups

_ANSWERS = Features({"predictions": TEXT, "references": TEXTS})


class VqaAccuracy(OfflineMetric):
    """Accuracy of VQA v2: an answer that three annotators gave is right."""

    inputs = _ANSWERS
    citation_text = "Antol et al. 2015, VQA: Visual Question Answering"

    def _compute(self, predictions: Any, references: Any, compat: bool = False) -> dict[str, Any]:
        """Give answers, and for each of them the annotators' answers. `compat` repeats the faults of the published
        script; see `vqa_accuracy`."""
        scores = list(vqa_accuracy(numbered(predictions), numbered(references), compat=compat).values())
        return {"vqa_accuracy": mean(scores), "vqa_accuracy_each": scores}


class ExactMatch(OfflineMetric):
    """Share of answers that equal a right one but for case and spaces."""

    inputs = _ANSWERS
    citation_text = ""

    def _compute(self, predictions: Any, references: Any, underscores_as_spaces: bool = False) -> dict[str, Any]:
        """Give answers, and for each the list of right ones."""
        scores = list(
            exact_match(
                numbered(predictions), numbered(references), underscores_as_spaces=underscores_as_spaces
            ).values()
        )
        return {"exact_match": mean(scores), "exact_match_each": scores}


class Wups(OfflineMetric):
    """WUPS at 0.9 and at 0.0: nearness in WordNet, through nltk."""

    inputs = _ANSWERS
    citation_text = "Malinowski & Fritz 2014, A Multi-World Approach to Question Answering about Real-World Scenes"

    def _compute(self, predictions: Any, references: Any, taxonomy: Taxonomy | None = None) -> dict[str, float]:
        """Give answers, and for each the list of right ones. `taxonomy`: in place of WordNet."""
        answers, right = numbered(predictions), numbered(references)
        return {
            f"wups_{threshold}": mean(list(wups(answers, right, threshold=threshold, taxonomy=taxonomy).values()))
            for threshold in (0.9, 0.0)
        }


class Classification(OfflineMetric):
    """Accuracy, and precision, recall and F1 of every class."""

    inputs: ClassVar = [
        Features({"predictions": Value("string"), "references": Value("string")}),
        Features({"predictions": Value("int64"), "references": Value("int64")}),
    ]
    citation_text = ""

    def _compute(self, predictions: Any, references: Any, labels: Any = None) -> dict[str, Any]:
        """Give predicted and true labels, as texts or as numbers. `labels`: all classes, in the order of the table."""
        return classification_report(predictions, references, labels)
