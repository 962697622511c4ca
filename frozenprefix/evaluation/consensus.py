"""Captions by retrieval, without any training: the bar that a trained mapper must clear.

Devlin et al. 2015, "Exploring Nearest Neighbor Approaches for Image Captioning": of all captions of the nearest
training pictures, take the one that agrees best with the others.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from frozenprefix.errors import DataError
from frozenprefix.evaluation.metrics.ptb import ptb_tokenize
from frozenprefix.evaluation.metrics.references import MAX_N, ngram_counts

_QUERIES_AT_ONCE = 256


def consensus_captions(
    query_features: ArrayLike,
    train_features: ArrayLike,
    train_captions: Sequence[Sequence[str]],
    k: int = 15,
    *,
    exclude: Sequence[int | None] | None = None,
) -> list[str]:
    """Return for each query picture the training caption that its neighbours agree on.

    Neighbours: largest cosine of features from which the training mean is subtracted. Agreement: mean over the other
    captions of the tf-idf cosine, averaged over n-grams of one to four words, with the inverse document frequencies of
    all training captions. Of equals the caption of the nearest picture wins.

    Args:
        query_features: float[Q, D].
        train_features: float[M, D].
        train_captions: the captions of each of the M training pictures, at least one each.
        k: neighbours per query; with fewer training pictures than that, all are used.
        exclude: for each query the row of the training picture that must not be used, its own, or None.

    Raises:
        DataError: shapes or lengths that do not fit, a picture without captions, or nothing left to retrieve from.
    """
    # queries: [Q, D], train: [M, D]
    queries, train = np.asarray(query_features, dtype=np.float32), np.asarray(train_features, dtype=np.float32)
    _check(queries, train, train_captions, k, exclude)
    neighbours = _neighbours(queries, train, k, exclude)
    texts = [text for captions in train_captions for text in captions]
    first_caption = np.concatenate([[0], np.cumsum([len(captions) for captions in train_captions])])
    vectors = _CaptionVectors(train_captions)
    chosen = []
    for row in neighbours:
        candidates = np.concatenate([np.arange(first_caption[i], first_caption[i + 1]) for i in row])
        chosen.append(texts[candidates[np.argmax(vectors.agreement(candidates))]])
    return chosen


class _CaptionVectors:
    """tf-idf vectors of all training captions as one sparse matrix: caption i is columns[starts[i]:starts[i + 1]]."""

    def __init__(self, train_captions: Sequence[Sequence[str]]):
        counts = [[ngram_counts(ptb_tokenize(text)) for text in captions] for captions in train_captions]
        frequencies = Counter(ngram for captions in counts for ngram in {n for each in captions for n in each})
        column = {ngram: i for i, ngram in enumerate(frequencies)}
        idf = {ngram: math.log(len(counts) / count) for ngram, count in frequencies.items()}
        columns: list[int] = []
        weights: list[float] = []
        starts = [0]
        for each in (one for captions in counts for one in captions):
            squares = [0.0] * (MAX_N + 1)
            for ngram, count in each.items():
                squares[len(ngram)] += (count * idf[ngram]) ** 2
            # Each n gets a unit vector; the sum of the four dot products is then four times the mean cosine.
            scale = [1 / math.sqrt(square) if square else 0.0 for square in squares]
            columns.extend(column[ngram] for ngram in each)
            weights.extend(count * idf[ngram] * scale[len(ngram)] for ngram, count in each.items())
            starts.append(len(columns))
        self.columns, self.starts = np.array(columns, dtype=np.int64), np.array(starts)
        self.weights = np.array(weights, dtype=np.float64)
        self._sum = np.zeros(len(column) + 1)

    def agreement(self, captions: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return for each of `captions` (rows, int[C]) its summed similarity to the others, float[C]."""
        entries = np.concatenate([np.arange(self.starts[i], self.starts[i + 1]) for i in captions])
        owner = np.repeat(np.arange(len(captions)), self.starts[captions + 1] - self.starts[captions])
        columns, weights = self.columns[entries], self.weights[entries]
        np.add.at(self._sum, columns, weights)
        # without a caption's own part: v · (sum − v)
        scores = np.zeros(len(captions))
        np.add.at(scores, owner, weights * (self._sum[columns] - weights))
        self._sum[columns] = 0.0
        return scores.round(12)  # equal captions differ by rounding errors only; the nearest must win


def _neighbours(
    queries: NDArray[np.float32], train: NDArray[np.float32], k: int, exclude: Sequence[int | None] | None
) -> list[NDArray[np.int64]]:
    """Return the rows of the k nearest training pictures of each query, nearest first."""
    mean = train.mean(axis=0)
    queries, train = _unit(queries - mean), _unit(train - mean)
    rows = []
    for start in range(0, len(queries), _QUERIES_AT_ONCE):
        # similarity: [Q', M]
        similarity = queries[start : start + _QUERIES_AT_ONCE] @ train.T
        for offset, line in enumerate(similarity):
            own = exclude[start + offset] if exclude is not None else None
            if own is not None:
                line[own] = -np.inf
            size = min(k, len(line) - (own is not None))
            nearest = np.argpartition(-line, size - 1)[:size]
            rows.append(nearest[np.lexsort((nearest, -line[nearest]))])
    return rows


def _unit(features: NDArray[np.float32]) -> NDArray[np.float32]:
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)


def _check(
    queries: NDArray[np.float32],
    train: NDArray[np.float32],
    train_captions: Sequence[Sequence[str]],
    k: int,
    exclude: Sequence[int | None] | None,
) -> None:
    if queries.ndim != 2 or train.ndim != 2 or queries.shape[1] != train.shape[1]:
        raise DataError(
            f"query_features and train_features must be [Q, D] and [M, D], got {list(queries.shape)} and "
            f"{list(train.shape)}; pool the features to one vector per picture"
        )
    if len(train) != len(train_captions):
        raise DataError(
            f"train_captions must have one list per training picture, {len(train)}; got {len(train_captions)}"
        )
    if k < 1:
        raise DataError(f"k must be ≥ 1, got {k}")
    bad = [i for i, captions in enumerate(train_captions) if isinstance(captions, str) or not captions]
    if bad:
        raise DataError(
            f"train_captions[{bad[0]}] must be a list of at least one caption, got {train_captions[bad[0]]!r}"
        )
    if exclude is not None and len(exclude) != len(queries):
        raise DataError(f"exclude must have one row or None per query, {len(queries)}; got {len(exclude)}")
    if exclude is not None and any(i is not None and not 0 <= i < len(train) for i in exclude):
        raise DataError(f"exclude must name rows of train_features, 0 to {len(train) - 1}, or None")
    if len(train) - (exclude is not None and any(i is not None for i in exclude)) < 1:
        raise DataError("no training picture is left to retrieve captions from")
