"""WUPS: how near an answer is to the right one in a taxonomy of words.

Malinowski & Fritz 2014, "A Multi-World Approach to Question Answering about Real-World Scenes", section 4. At a
threshold of 0.9 near synonyms count and everything else keeps a tenth; at 0.0 every similarity counts in full. A list
of answers in one string ("book, scissor", as DAQUAR has) is compared as a set.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Protocol

from frozenprefix.errors import AssetError, DataError
from frozenprefix.evaluation.metrics.ids import check_same_ids

_BELOW_THRESHOLD = 0.1


class Taxonomy(Protocol):
    """Gives the Wu-Palmer similarity of two words in their nearest senses, in [0, 1]; 0 for a word it does not know."""

    def similarity(self, first: str, second: str) -> float: ...


class WordNet:
    """The nouns of WordNet, through nltk.

    Args:
        reader: an nltk WordNet reader; by default `nltk.corpus.wordnet`.

    Raises:
        AssetError: nltk or its WordNet corpus is not installed. Nothing is downloaded.
    """

    def __init__(self, reader: Any = None):
        self._reader = _nltk_wordnet() if reader is None else reader
        self.similarity = lru_cache(maxsize=100_000)(self._similarity)

    def _similarity(self, first: str, second: str) -> float:
        pairs = ((a, b) for a in self._senses(first) for b in self._senses(second))
        return max((a.wup_similarity(b) or 0.0 for a, b in pairs), default=0.0)

    def _senses(self, word: str) -> list[Any]:
        return self._reader.synsets(word.replace(" ", "_"), pos="n")


def _nltk_wordnet() -> Any:
    fix = "pip install nltk, then python -m nltk.downloader wordnet on a machine with a network"
    try:
        from nltk.corpus import wordnet
    except ImportError as error:
        raise AssetError(f"WUPS needs WordNet: nltk is not installed; {fix}") from error
    try:
        wordnet.ensure_loaded()
    except LookupError as error:
        raise AssetError(f"WUPS needs WordNet: nltk has no corpus 'wordnet' on this machine; {fix}") from error
    return wordnet


def wups(
    predictions: Mapping[str, str],
    answers: Mapping[str, Sequence[str]],
    *,
    threshold: float = 0.9,
    taxonomy: Taxonomy | None = None,
) -> dict[str, float]:
    """Score answers by WUPS; of several right answers the nearest counts.

    For the sets A of predicted and T of true words: the smaller of Π over A of the greatest similarity to T, and Π over
    T of the greatest similarity to A. Equal words have similarity 1, known to the taxonomy or not.

    Args:
        predictions: question id → answer; a comma separates the words of a list.
        answers: question id → right answers, at least one.
        threshold: a similarity below it is multiplied by 0.1.
        taxonomy: by default `WordNet()`.

    Returns:
        question id → score in [0, 1].
    """
    check_same_ids(predictions, answers, "answers")
    bad = [key for key, texts in answers.items() if isinstance(texts, str) or not texts]
    if bad:
        raise DataError(f"answers[{bad[0]!r}] must be a list of at least one answer, got {answers[bad[0]]!r}")
    if not 0 <= threshold <= 1:
        raise DataError(f"threshold must lie in [0, 1], got {threshold}")
    words = WordNet() if taxonomy is None else taxonomy
    return {
        key: max(_answer_score(predictions[key], answer, threshold, words) for answer in right)
        for key, right in answers.items()
    }


def _items(text: str) -> list[str]:
    """The words of an answer; "tape_dispenser" and "tape dispenser" are one."""
    items = (" ".join(item.lower().replace("_", " ").split()) for item in text.split(","))
    return list(dict.fromkeys(item for item in items if item))


def _answer_score(prediction: str, answer: str, threshold: float, taxonomy: Taxonomy) -> float:
    predicted, true = _items(prediction), _items(answer)
    if not predicted or not true:
        return float(prediction.strip() == answer.strip())

    def near(first: str, second: str) -> float:
        if first == second:
            return 1.0
        score = taxonomy.similarity(first, second)
        return score if score >= threshold else score * _BELOW_THRESHOLD

    forth = math.prod(max(near(a, t) for t in true) for a in predicted)
    back = math.prod(max(near(a, t) for a in predicted) for t in true)
    return min(forth, back)
