"""BLEU, ROUGE-L and CIDEr-D of captions, equal to pycocoevalcap, without Java.

BLEU: Papineni et al. 2002, over the whole corpus, closest reference length. ROUGE-L: Lin 2004, beta 1.2, best precision
and best recall over the references. CIDEr-D: Vedantam et al. 2015, section 6, n = 4, sigma = 6, times 10.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from frozenprefix.data.neighbours import MAX_N
from frozenprefix.errors import DataError
from frozenprefix.evaluation.metrics.diversity import repetition
from frozenprefix.evaluation.metrics.ids import check_same_ids
from frozenprefix.evaluation.metrics.references import Caption, CaptionReferences, Counts, TfIdf

ROUGE_BETA = 1.2
CIDER_SIGMA = 6.0
# pycocoevalcap's guards against a division by zero; they show in the scores of very short captions.
_TINY, _SMALL = 1e-15, 1e-9


@dataclass(frozen=True)
class CaptionScores:
    """Scores of one prediction set.

    `corpus` has bleu_1 to bleu_4, rouge_l, cider_d, and of the predictions themselves: distinct_captions (number of
    different captions), most_common_share (of the images, in [0, 1]) and mean_length (words). `per_image` has the first
    six for each id. BLEU and ROUGE-L lie in [0, 1], CIDEr-D in [0, 10]. BLEU of a corpus is not a mean over images:
    `bleu_statistics` has the ten counts of each id whose sums `bleu_of_sums` turns into BLEU.

    Example:
        >>> scores = caption_metrics({"1": "a dog", "2": "a cat"}, {"1": ["a dog"], "2": ["a cat"]})
        >>> isinstance(scores, CaptionScores), scores.per_image["1"]["rouge_l"]
        (True, 1.0)
    """

    corpus: dict[str, float]
    per_image: dict[str, dict[str, float]]
    bleu_statistics: dict[str, list[int]]


def caption_metrics(
    predictions: Mapping[str, str], references: Mapping[str, Sequence[str]] | CaptionReferences
) -> CaptionScores:
    """Score one caption per image against its references.

    Args:
        predictions: image id → caption as plain text; it may be empty.
        references: image id → captions, or a `CaptionReferences` to score several prediction sets with.

    Raises:
        DataError: an id is missing or unexpected, or a prediction is not a string.

    Example:
        >>> references = {"1": ["a dog runs on grass"], "2": ["a cat sits"]}
        >>> round(caption_metrics({"1": "a dog runs", "2": "a cat sits"}, references).corpus["bleu_1"], 3)
        0.717
    """
    if not isinstance(references, CaptionReferences):
        references = CaptionReferences(references)
    check_same_ids(predictions, references.captions, "references")
    captions = {key: _candidate(key, predictions[key]) for key in references.captions}
    statistics = {key: _bleu_statistics(caption, references, key) for key, caption in captions.items()}
    per_image = {
        key: {
            **_bleu(statistics[key]),
            "rouge_l": _rouge_l(caption, references.captions[key]),
            "cider_d": _cider_d(references.weigh(caption.counts), references.tf_idf[key]),
        }
        for key, caption in captions.items()
    }
    total = [sum(column) for column in zip(*statistics.values(), strict=True)]
    means = {name: _mean([scores[name] for scores in per_image.values()]) for name in ("rouge_l", "cider_d")}
    corpus = {**_bleu(total), **means, **repetition([tuple(caption.words) for caption in captions.values()])}
    return CaptionScores(corpus, per_image, statistics)


def _candidate(key: str, text: object) -> Caption:
    if not isinstance(text, str):
        raise DataError(f"predictions[{key!r}] must be one caption as a string, got {type(text).__name__}: {text!r}")
    return Caption.from_text(text)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _bleu_statistics(caption: Caption, references: CaptionReferences, key: str) -> list[int]:
    """Return [words, closest reference length, n-grams for n = 1..4, matches with a reference for n = 1..4]."""
    words = len(caption.words)
    closest = min((abs(len(each.words) - words), len(each.words)) for each in references.captions[key])[1]
    matches = [0] * MAX_N
    most = references.max_counts[key]
    for ngram, count in caption.counts.items():
        matches[len(ngram) - 1] += min(count, most.get(ngram, 0))
    return [words, closest, *(max(0, words - n) for n in range(MAX_N)), *matches]


def _bleu(statistics: Sequence[int]) -> dict[str, float]:
    words, closest = statistics[:2]
    possible, matches = statistics[2 : 2 + MAX_N], statistics[2 + MAX_N :]
    ratio = (words + _TINY) / (closest + _SMALL)
    brevity = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    product, scores = 1.0, {}
    for n in range(MAX_N):
        product *= (matches[n] + _TINY) / (possible[n] + _SMALL)
        scores[f"bleu_{n + 1}"] = product ** (1 / (n + 1)) * brevity
    return scores


def bleu_of_sums(sums: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    """BLEU of many corpora at once.

    Args:
        sums: of `CaptionScores.bleu_statistics` over the images of each corpus, float[..., 10].

    Returns:
        `bleu_1` to `bleu_4`, float[...] each.
    """
    words, closest = sums[..., 0], sums[..., 1]
    possible, matches = sums[..., 2 : 2 + MAX_N], sums[..., 2 + MAX_N :]
    ratio = (words + _TINY) / (closest + _SMALL)
    brevity = np.exp(np.minimum(0.0, 1 - 1 / ratio))
    products = np.cumprod((matches + _TINY) / (possible + _SMALL), axis=-1)
    return {f"bleu_{n + 1}": np.asarray(products[..., n] ** (1 / (n + 1)) * brevity) for n in range(MAX_N)}


def _rouge_l(caption: Caption, references: Sequence[Caption]) -> float:
    # a caption of which tokenisation leaves nothing counts as one token, in pycocoevalcap as an empty one
    candidate = caption.tokens or [caption.plain]
    precision = recall = 0.0
    for reference in references:
        tokens = reference.tokens or [reference.plain]
        common = _longest_common_subsequence(candidate, tokens)
        precision = max(precision, common / len(candidate))
        recall = max(recall, common / len(tokens))
    if not precision or not recall:
        return 0.0
    return (1 + ROUGE_BETA**2) * precision * recall / (recall + ROUGE_BETA**2 * precision)


def _longest_common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Return the length of the longest common subsequence, one addition per token of `second` (Hyyrö 2004)."""
    positions: dict[str, int] = {}
    for index, token in enumerate(first):
        positions[token] = positions.get(token, 0) | 1 << index
    everything = (1 << len(first)) - 1
    row = everything
    for token in second:
        matches = row & positions.get(token, 0)
        row = (row + matches | row - matches) & everything
    return len(first) - bin(row).count("1")


def cider_d(caption: str, references: CaptionReferences, key: str) -> float:
    """CIDEr-D of one caption against the references of image `key`, in [0, 10]."""
    return _cider_d(references.weigh(_candidate(key, caption).counts), references.tf_idf[key])


def word_precision(caption: str, references: CaptionReferences, key: str) -> float:
    """How much of what a caption says is in a reference of image `key`: a share of its words, in [0, 1].

    Words count by their inverse document frequency, as in CIDEr, and as often as the reference with most of them has
    them. So a colour or an object that no reference names costs much, and an article nothing. An empty caption has 0.

    Example:
        >>> references = CaptionReferences({"1": ["a red dog runs"], "2": ["a cat sits"]})
        >>> [round(word_precision(text, references, "1"), 2) for text in ("a dog", "a blue dog", "a cat")]
        [1.0, 0.5, 0.0]
    """
    most = references.max_counts[key]
    words: Counts = {(word,): count for word, count in Counter(_candidate(key, caption).words).items()}
    weights = references.weigh(words).weights
    total = sum(weights.values())
    right = [weight * min(1.0, most.get(word, 0) / words[word]) for word, weight in weights.items()]
    return sum(right) / total if total else 0.0


def _cider_d(candidate: TfIdf, references: Sequence[TfIdf]) -> float:
    """Return 10 times the clipped, length-damped tf-idf cosine, averaged over n = 1..4 and the references."""
    total = 0.0
    for reference in references:
        overlap = [0.0] * MAX_N
        weights = reference.weights
        for ngram, weight in candidate.weights.items():
            other = weights.get(ngram)
            if other is not None:
                overlap[len(ngram) - 1] += min(weight, other) * other
        similarity = sum(
            dot / (norm * other_norm) if norm and other_norm else dot
            for dot, norm, other_norm in zip(overlap, candidate.norms, reference.norms, strict=True)
        )
        total += similarity * math.exp(-((candidate.length - reference.length) ** 2) / (2 * CIDER_SIGMA**2))
    return 10.0 * total / MAX_N / len(references)
