"""Nearest images by their features, and how well their captions agree with each other."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

_QUERIES_AT_ONCE = 256


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
    def from_counts(cls, counts: Sequence[Sequence[Mapping[tuple[str, ...], int]]]) -> CaptionVectors:
        """Weigh n-grams by the inverse document frequency over images, as CIDEr does (Vedantam et al. 2015).

        Args:
            counts: for each image, for each of its captions: n-gram → how often it occurs.
        """
        # n-gram → number of images with a caption that holds it
        frequencies: Counter[tuple[str, ...]] = Counter()
        for captions in counts:
            frequencies.update(set().union(*captions))
        column = {ngram: i for i, ngram in enumerate(frequencies)}
        idf = {ngram: math.log(len(counts) / count) for ngram, count in frequencies.items()}
        longest = max(map(len, frequencies), default=0)
        columns: list[int] = []
        weights: list[float] = []
        starts = [0]
        for each in (one for captions in counts for one in captions):
            squares = [0.0] * (longest + 1)
            for ngram, count in each.items():
                squares[len(ngram)] += (count * idf[ngram]) ** 2
            # each n gets a unit vector: the dot product is then the sum of the cosines of all n
            scale = [1 / math.sqrt(square) if square else 0.0 for square in squares]
            columns.extend(column[ngram] for ngram in each)
            weights.extend(count * idf[ngram] * scale[len(ngram)] for ngram, count in each.items())
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
