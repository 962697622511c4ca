"""Which images a new image is like, by their features, and how well captions agree with each other."""

from __future__ import annotations

import math
import warnings
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

MAX_N = 4  #: words of the longest n-gram, as in CIDEr
_QUERIES_AT_ONCE = 256

Ngrams = Mapping[tuple[str, ...], int]  #: n-gram of words → how often it occurs


def ngram_counts(words: Sequence[str]) -> dict[tuple[str, ...], int]:
    """How often each n-gram of one to four words occurs.

    Example:
        >>> ngram_counts(["a", "dog"])
        {('a',): 1, ('dog',): 1, ('a', 'dog'): 1}
    """
    return dict(Counter(tuple(words[i : i + n]) for n in range(1, MAX_N + 1) for i in range(len(words) - n + 1)))


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


class RidgeWeights:
    """Weights of M images, to predict what a new image has as a weighted mean of what they have.

    They are those of ridge regression from features to anything: captions' n-grams, for example. Features are
    standardised and scaled to length one. The weights of an image sum to one, and some are negative: what an image is
    not like says something too.

    Args:
        known: float[M, D].
        ridge: the regularisation; the larger, the more equal are the weights.

    Example:
        >>> weights = RidgeWeights([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]], ridge=0.1)
        >>> weights([[0.9, 0.1]]).argmax().item()
        0
    """

    def __init__(self, known: ArrayLike, ridge: float = 0.5):
        features = torch.as_tensor(np.asarray(known, dtype=np.float32))
        self._mean, spread = features.mean(dim=0), features.std(dim=0, correction=0)
        self._scale = torch.where(spread > 0, spread, 1.0)
        self._known = self._standard(features)
        images, dim = self._known.shape
        self._primal = dim <= images
        # gram: [D, D] or [M, M], the smaller one
        gram = self._known.T @ self._known if self._primal else self._known @ self._known.T
        gram.diagonal().add_(ridge)
        self._factor = torch.linalg.cholesky(gram)

    def __call__(self, queries: ArrayLike, *, exclude: Sequence[int | None] | None = None) -> Tensor:
        """float32[Q, M].

        Args:
            queries: float[Q, D].
            exclude: for each query the row of the same image, or None. Its weight is 0, and the others are what they
                would be without it.
        """
        features = self._standard(torch.as_tensor(np.asarray(queries, dtype=np.float32)))
        if self._primal:
            weights = torch.cholesky_solve(features.T, self._factor).T @ self._known.T
        else:
            weights = torch.cholesky_solve(self._known @ features.T, self._factor).T
        shares = torch.full_like(weights, 1 / weights.shape[1])
        for row, own in enumerate(exclude or ()):
            if own is not None:
                weights[row] /= 1 - weights[row, own]  # leave-one-out, exactly
                weights[row, own] = 0.0
                shares[row] = 1 / (weights.shape[1] - 1)
                shares[row, own] = 0.0
        return weights + (1 - weights.sum(dim=1, keepdim=True)) * shares

    def _standard(self, features: Tensor) -> Tensor:
        return torch.nn.functional.normalize((features - self._mean) / self._scale)


def _unit(features: NDArray[np.float32]) -> NDArray[np.float32]:
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)


class CaptionVectors:
    """tf-idf vectors of captions as one sparse matrix: caption i is columns[starts[i]:starts[i + 1]].

    Args:
        columns: int[E], number of the n-gram.
        weights: float[E].
        starts: int[captions + 1].
        idf: n-gram → inverse document frequency, in the order of `columns`; `similarity` needs it.
        rarest: the inverse document frequency of an n-gram that is in no caption.

    Example:
        >>> counts = [[{("dog",): 1}], [{("dog",): 1, ("red",): 1}], [{("cat",): 1}]]
        >>> CaptionVectors.from_counts(counts).agreement(np.arange(3)).round(2).tolist()
        [0.35, 0.35, 0.0]
    """

    def __init__(
        self,
        columns: NDArray[np.integer],
        weights: NDArray[np.floating],
        starts: NDArray[np.integer],
        idf: Mapping[tuple[str, ...], float] | None = None,
        rarest: float = 0.0,
    ):
        self.columns, self.weights, self.starts = columns, weights, starts
        self.idf, self.rarest = idf or {}, rarest
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
        arrays = np.array(columns, dtype=np.int64), np.array(weights, dtype=np.float64), np.array(starts)
        return cls(*arrays, idf, math.log(max(1, len(counts))))

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

    def weighted_sum(self, caption_weights: Tensor) -> Tensor:
        """Weighted sums of all captions' vectors: float32[n-grams, Q].

        Args:
            caption_weights: float32[Q, captions].
        """
        return self._matrices[1] @ caption_weights.T

    def scores(self, sums: Tensor) -> Tensor:
        """The product of every caption's vector with weighted sums: float32[Q, captions]."""
        return (self._matrices[0] @ sums).T

    def similarity(self, texts: Sequence[Ngrams], total: Tensor) -> NDArray[np.float64]:
        """The product of the vectors of other texts with one weighted sum, averaged over n: float[texts].

        A sum of weights one makes it the weighted mean of cosines, with n-grams that no caption has as the rarest ones.

        Args:
            total: float32[n-grams].

        Example:
            >>> vectors = CaptionVectors.from_counts([[{("dog",): 1}], [{("cat",): 1}]])
            >>> total = vectors.weighted_sum(torch.tensor([[0.75, 0.25]]))[:, 0]
            >>> vectors.similarity([{("dog",): 1}, {("cow",): 1}], total).tolist()
            [0.75, 0.0]
        """
        products = []
        for counts in texts:
            weights = _unit_weights(counts, {ngram: self.idf.get(ngram, self.rarest) for ngram in counts})
            known = [ngram for ngram in weights if ngram in self._column]
            values = total[[self._column[ngram] for ngram in known]].tolist()
            products.append(sum(weights[ngram] * value for ngram, value in zip(known, values, strict=True)))
        return np.array(products) / self._orders

    @cached_property
    def _column(self) -> dict[tuple[str, ...], int]:
        return {ngram: i for i, ngram in enumerate(self.idf)}

    @cached_property
    def _orders(self) -> int:
        return max(map(len, self.idf), default=1)

    @cached_property
    def _matrices(self) -> tuple[Tensor, Tensor]:
        """float32[captions, n-grams] and its transpose, sparse."""
        captions = len(self.starts) - 1
        owner = torch.from_numpy(np.repeat(np.arange(captions), np.diff(self.starts)))
        places = torch.stack([owner, torch.from_numpy(self.columns.astype(np.int64))])
        shape = (captions, len(self._sum))
        weights = torch.from_numpy(self.weights.astype(np.float32))
        matrix = torch.sparse_coo_tensor(places, weights, shape, check_invariants=False).coalesce()
        return _fast_sparse(matrix), _fast_sparse(matrix.t().coalesce())


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


def _fast_sparse(matrix: Tensor) -> Tensor:
    """The layout in which products with a dense matrix are fastest here: rows together need MKL."""
    if not torch.backends.mkl.is_available():
        return matrix
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        return matrix.to_sparse_csr()
