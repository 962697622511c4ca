"""Metrics of captions: `predictions` are texts, `references` lists of texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Features

from frozenprefix.evaluation.metrics.captions import CaptionScores, caption_metrics
from frozenprefix.evaluation.metrics.diversity import diversity
from frozenprefix.evaluation.metrics.hf.base import TEXT, TEXTS, OfflineMetric, numbered
from frozenprefix.evaluation.metrics.java import meteor, spice
from frozenprefix.evaluation.metrics.references import CaptionReferences, Ngram

_CAPTIONS = Features({"predictions": TEXT, "references": TEXTS})


def _score(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    df: tuple[Mapping[Ngram, float], float] | None = None,
) -> CaptionScores:
    return caption_metrics(numbered(predictions), CaptionReferences(numbered(references), df=df))


class Bleu(OfflineMetric):
    """BLEU-1 to BLEU-4 of captions, over the corpus, equal to pycocoevalcap's."""

    inputs = _CAPTIONS
    citation_text = "Papineni et al. 2002, BLEU: a Method for Automatic Evaluation of Machine Translation"

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        """Give captions, and for each a list of references."""
        scores = _score(predictions, references).corpus
        return {name: scores[name] for name in ("bleu_1", "bleu_2", "bleu_3", "bleu_4")}


class RougeL(OfflineMetric):
    """ROUGE-L of captions, equal to pycocoevalcap's."""

    inputs = _CAPTIONS
    citation_text = "Lin 2004, ROUGE: A Package for Automatic Evaluation of Summaries"

    def _compute(self, predictions: Any, references: Any) -> dict[str, Any]:
        """Give captions, and for each a list of references. `rouge_l_each` has the score of every caption."""
        return _with_each(_score(predictions, references), "rouge_l")


class CiderD(OfflineMetric):
    """CIDEr-D of captions, equal to pycocoevalcap's. With the references of one image it is 0: give `df`."""

    inputs = _CAPTIONS
    citation_text = "Vedantam et al. 2015, CIDEr: Consensus-based Image Description Evaluation"

    def _compute(self, predictions: Any, references: Any, df: Any = None) -> dict[str, Any]:
        """Give captions, and for each a list of references. `df`: document frequencies of another corpus, as
        `CaptionReferences` takes them; by default those of the references. `cider_d_each` has the score of every
        caption."""
        return _with_each(_score(predictions, references, df), "cider_d")


def _with_each(scores: CaptionScores, name: str) -> dict[str, Any]:
    return {name: scores.corpus[name], f"{name}_each": [each[name] for each in scores.per_image.values()]}


class Meteor(OfflineMetric):
    """METEOR 1.5 of captions, through pycocoevalcap's program; needs Java."""

    inputs = _CAPTIONS
    citation_text = "Denkowski & Lavie 2014, Meteor Universal"

    def _compute(self, predictions: Any, references: Any) -> dict[str, Any]:
        """Give captions, and for each a list of references. `meteor_each` has the score of every caption."""
        scores = meteor(numbered(predictions), numbered(references))
        return {"meteor": scores.corpus, "meteor_each": list(scores.per_image.values())}


class Spice(OfflineMetric):
    """SPICE of captions, through pycocoevalcap's program; needs Java and the models of Stanford CoreNLP."""

    inputs = _CAPTIONS
    citation_text = "Anderson et al. 2016, SPICE: Semantic Propositional Image Caption Evaluation"

    def _compute(self, predictions: Any, references: Any) -> dict[str, Any]:
        """Give captions, and for each a list of references. `spice_each` has the score of every caption."""
        scores = spice(numbered(predictions), numbered(references))
        return {"spice": scores.corpus, "spice_each": list(scores.per_image.values())}


class Diversity(OfflineMetric):
    """distinct-n, different captions and the share of the commonest one, without references."""

    inputs = Features({"predictions": TEXT})
    citation_text = "Li et al. 2016, A Diversity-Promoting Objective Function for Neural Conversation Models"

    def _compute(self, predictions: Any, max_n: int = 4) -> dict[str, float]:
        """Give captions. `max_n`: the longest n-gram of distinct-n."""
        return diversity(predictions, max_n=max_n)
