"""Nearest images by their features, and how well their captions agree with each other."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

_QUERIES_AT_ONCE = 256

Ngrams = Mapping[tuple[str, ...], int]  #: n-gram of words → how often it occurs


class NearestImages:
    """Finds the nearest of M images by the cosine of features, after subtracting the mean of the M.

    Args:
        known: float[M, D].

    Example:
        >>> nearest = NearestImages([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]])
        >>> nearest([[0.9, 0.1]], k=2)[0].tolist()
        [0, 1]
    """

    def __init__(self, known: ArrayLike):
        known = np.asarray(known, dtype=np.float32)
        self._mean = known.mean(axis=0)
        self._known = _unit(known - self._mean)

    def __call__(
        self, queries: ArrayLike, k: int, *, exclude: Sequence[int | None] | None = None
    ) -> list[NDArray[np.int64]]:
        """The rows of the k nearest images of each query, nearest first; all rows when there are fewer.

        Args:
            queries: float[Q, D].
            exclude: for each query a row that is left out (its own), or None.
        """
        queries = _unit(np.asarray(queries, dtype=np.float32) - self._mean)
        rows = []
        for start in range(0, len(queries), _QUERIES_AT_ONCE):
            # similarity: [Q', M]
            similarity = queries[start : start + _QUERIES_AT_ONCE] @ self._known.T
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


class CaptionVectors:
    """tf-idf vectors of captions as one sparse matrix: caption i is columns[starts[i]:starts[i + 1]].

    Args:
        columns: int[E], number of the n-gram.
        weights: float[E].
        starts: int[captions + 1].

    Example:
        >>> counts = [[{("dog",): 1}], [{("dog",): 1, ("red",): 1}], [{("cat",): 1}]]
        >>> CaptionVectors.from_counts(counts).agreement(np.arange(3)).round(2).tolist()
        [0.35, 0.35, 0.0]
    """

    def __init__(self, columns: NDArray[np.integer], weights: NDArray[np.floating], starts: NDArray[np.integer]):
        self.columns, self.weights, self.starts = columns, weights, starts
        self._sum = np.zeros(int(columns.max(initial=-1)) + 1)

    @classmethod
    def from_counts(cls, counts: Sequence[Sequence[Ngrams]]) -> CaptionVectors:
        """Weigh n-grams by the inverse document frequency over images, as CIDEr does (Vedantam et al. 2015).

        Args:
            counts: for each image, for each of its captions: n-gram → how often it occurs.
        """
        idf = _inverse_frequencies(counts)
        column = {ngram: i for i, ngram in enumerate(idf)}
        columns: list[int] = []
        weights: list[float] = []
        starts = [0]
        for each in (one for captions in counts for one in captions):
            columns.extend(column[ngram] for ngram in each)
            weights.extend(_unit_weights(each, idf).values())
            starts.append(len(columns))
        return cls(np.array(columns, dtype=np.int64), np.array(weights, dtype=np.float64), np.array(starts))

    def agreement(self, captions: NDArray[np.int64]) -> NDArray[np.float64]:
        """The summed similarity of each of `captions` (rows, int[C]) to the others: float[C]."""
        entries = np.concatenate([np.arange(self.starts[i], self.starts[i + 1]) for i in captions])
        owner = np.repeat(np.arange(len(captions)), self.starts[captions + 1] - self.starts[captions])
        columns, weights = self.columns[entries], self.weights[entries].astype(np.float64)
        np.add.at(self._sum, columns, weights)
        # similarity to all others without itself: v · (sum − v)
        scores = np.zeros(len(captions))
        np.add.at(scores, owner, weights * (self._sum[columns] - weights))
        self._sum[columns] = 0.0
        return scores.round(12)  # equal captions differ by rounding errors only; the nearest must win


class CaptionAgreement:
    """How well texts agree with captions: the mean cosine of their tf-idf vectors, as in `CaptionVectors`.

    Args:
        counts: the n-grams of all captions of each image of a collection, for the document frequencies.

    Example:
        >>> dog, cat = {("a",): 1, ("dog",): 1}, {("a",): 1, ("cat",): 1}
        >>> CaptionAgreement([[dog], [cat]])([dog, cat], [dog, dog, cat]).round(2).tolist()
        [0.67, 0.33]
    """

    def __init__(self, counts: Sequence[Sequence[Ngrams]]):
        self._idf = _inverse_frequencies(counts)
        self._orders = max(map(len, self._idf), default=1)
        self._rarest = math.log(max(1, len(counts)))

    def __call__(self, texts: Sequence[Ngrams], captions: Sequence[Ngrams]) -> NDArray[np.float64]:
        """float[texts], each from 0 to 1."""
        total: defaultdict[tuple[str, ...], float] = defaultdict(float)
        for caption in captions:
            for ngram, weight in self._weights(caption).items():
                total[ngram] += weight
        scale = 1 / (self._orders * max(1, len(captions)))
        agreements = [
            scale * sum(weight * total.get(ngram, 0.0) for ngram, weight in self._weights(text).items())
            for text in texts
        ]
        return np.array(agreements)

    def _weights(self, counts: Ngrams) -> dict[tuple[str, ...], float]:
        return _unit_weights(counts, {ngram: self._idf.get(ngram, self._rarest) for ngram in counts})


def _inverse_frequencies(counts: Sequence[Sequence[Ngrams]]) -> dict[tuple[str, ...], float]:
    """n-gram → logarithm of how few images have a caption with it."""
    frequencies: Counter[tuple[str, ...]] = Counter()
    for captions in counts:
        frequencies.update(set().union(*captions))
    return {ngram: math.log(len(counts) / count) for ngram, count in frequencies.items()}


def _unit_weights(counts: Ngrams, idf: Mapping[tuple[str, ...], float]) -> dict[tuple[str, ...], float]:
    """A caption's tf-idf vector. Each n gets a unit vector: a dot product is then the sum of the cosines of all n."""
    squares: defaultdict[int, float] = defaultdict(float)
    for ngram, count in counts.items():
        squares[len(ngram)] += (count * idf[ngram]) ** 2
    return {
        ngram: count * idf[ngram] / math.sqrt(squares[len(ngram)]) if squares[len(ngram)] else 0.0
        for ngram, count in counts.items()
    }
