"""Diversity of a set of captions: low for a model that writes the same caption for every image."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from frozenprefix.errors import DataError
from frozenprefix.evaluation.metrics.ptb import ptb_tokenize


def diversity(captions: Sequence[str], *, max_n: int = 4) -> dict[str, float]:
    """Describe captions without any reference.

    Returns:
        `distinct_1` … `distinct_{max_n}`: different n-grams over all n-grams of all captions, in [0, 1], 0 without any
        (Li et al. 2016, "A Diversity-Promoting Objective Function", section 4); `distinct_captions`: number of
        different captions; `most_common_share`: share of the commonest one, in [0, 1]; `vocabulary`: number of
        different words; `mean_length`: words a caption.

    Raises:
        DataError: without captions, or for max_n < 1.

    Example:
        >>> diversity(["a dog", "a dog"], max_n=1)["distinct_1"]
        0.5
    """
    if not captions:
        raise DataError("captions are empty; expected at least one")
    if max_n < 1:
        raise DataError(f"max_n must be ≥ 1, got {max_n}")
    words = [tuple(ptb_tokenize(text)) for text in captions]
    result = {}
    for n in range(1, max_n + 1):
        ngrams = [each[i : i + n] for each in words for i in range(len(each) - n + 1)]
        result[f"distinct_{n}"] = len(set(ngrams)) / len(ngrams) if ngrams else 0.0
    return {**result, **repetition(words), "vocabulary": len({word for each in words for word in each})}


def repetition(captions: Sequence[tuple[str, ...]]) -> dict[str, float]:
    """`distinct_captions`, `most_common_share` and `mean_length` of captions that are words already, one or more."""
    counts = Counter(captions)
    return {
        "distinct_captions": len(counts),
        "most_common_share": max(counts.values()) / len(captions),
        "mean_length": sum(map(len, captions)) / len(captions),
    }
