"""Bootstrap intervals of a score, and paired differences of two systems.

Koehn 2004, "Statistical Significance Tests for Machine Translation Evaluation": the test set is resampled with
replacement and scored again. A score here is a function of sums over samples (a mean, or BLEU from its counts), so each
draw is a weighted sum.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from frozenprefix.errors import DataError

#: Sums of the K statistics over the samples of each draw, float[n, K] → the metric of each draw, float[n].
Metric = Callable[[NDArray[np.float64]], NDArray[np.float64]]


@dataclass(frozen=True)
class Interval:
    """A score and its confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class PairedDifference:
    """`difference` = b − a with its interval, and the two-sided p-value of no difference."""

    a: float
    b: float
    difference: float
    low: float
    high: float
    p_value: float


def bootstrap_interval(
    scores: ArrayLike,
    metric: Metric | None = None,
    *,
    n: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
    clusters: Sequence[Hashable] | None = None,
) -> Interval:
    """Percentile interval of a score.

    Args:
        scores: per sample its score, float[N], or with `metric` its statistics, float[N, K].
        metric: from sums of statistics to the score; by default the mean of the scores.
        n: number of draws.
        clusters: the cluster of each sample, such as its image. Whole clusters are drawn, because answers about the
            same image are not independent. By default samples are drawn.

    Raises:
        DataError: for no samples, values that are not finite, or lengths that differ.

    Example:
        >>> bootstrap_interval([1.0, 1.0, 1.0])
        Interval(value=1.0, low=1.0, high=1.0)
    """
    rows, metric = _rows(scores, metric)
    values = metric(_draws(_by_cluster(rows, clusters), n, seed))
    low, high = _bounds(values, confidence)
    return Interval(float(metric(rows.sum(axis=0)[None])[0]), low, high)


def paired_bootstrap(
    a: ArrayLike,
    b: ArrayLike,
    metric: Metric | None = None,
    *,
    n: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
    clusters: Sequence[Hashable] | None = None,
) -> PairedDifference:
    """Difference of two systems on the same samples, in the same order; each draw scores both.

    The p-value is twice the share of draws on the other side of 0, with one draw added so that it is never 0: it cannot
    fall below 2 / (n + 1). Arguments as in `bootstrap_interval`.

    Example:
        >>> paired_bootstrap([0.0, 0.0, 0.0], [1.0, 1.0, 1.0]).difference
        1.0
    """
    (first, metric_a), (second, _) = _rows(a, metric), _rows(b, metric)
    if first.shape != second.shape:
        raise DataError(f"a and b must be scores of the same samples, got {len(first)} and {len(second)} samples")
    score = metric_a
    width = first.shape[1]
    sums = _draws(_by_cluster(np.hstack([first, second]), clusters), n, seed)
    differences = score(sums[:, width:]) - score(sums[:, :width])
    low, high = _bounds(differences, confidence)
    value_a, value_b = (float(score(rows.sum(axis=0)[None])[0]) for rows in (first, second))
    less, more = int((differences <= 0).sum()), int((differences >= 0).sum())
    p_value = min(1.0, 2 * (min(less, more) + 1) / (n + 1))
    return PairedDifference(value_a, value_b, value_b - value_a, low, high, p_value)


def _rows(scores: ArrayLike, metric: Metric | None) -> tuple[NDArray[np.float64], Metric]:
    rows = np.asarray(scores, dtype=np.float64)
    if metric is None:
        if rows.ndim != 1:
            raise DataError(f"scores must be [samples] without a metric, got shape {list(rows.shape)}")
        rows, metric = np.stack([rows, np.ones_like(rows)], axis=1), _mean
    if rows.ndim != 2 or not len(rows):
        raise DataError(f"scores must be [samples, statistics] with at least one sample, got {list(rows.shape)}")
    if not np.isfinite(rows).all():
        raise DataError(f"scores: {int((~np.isfinite(rows)).sum())} values are not finite")
    return rows, metric


def _mean(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    return sums[:, 0] / sums[:, 1]


def _by_cluster(rows: NDArray[np.float64], clusters: Sequence[Hashable] | None) -> NDArray[np.float64]:
    """Sum the rows of each cluster: float[clusters, K]."""
    if clusters is None:
        return rows
    if len(clusters) != len(rows):
        raise DataError(f"clusters must have one entry per sample, {len(rows)}; got {len(clusters)}")
    place = {cluster: i for i, cluster in enumerate(dict.fromkeys(clusters))}
    summed = np.zeros((len(place), rows.shape[1]))
    np.add.at(summed, [place[cluster] for cluster in clusters], rows)
    return summed


def _draws(rows: NDArray[np.float64], n: int, seed: int) -> NDArray[np.float64]:
    """Sums over n sets of len(rows) rows drawn with replacement: float[n, K]."""
    if n < 1:
        raise DataError(f"n must be ≥ 1, got {n}")
    generator, size = np.random.default_rng(seed), len(rows)
    sums = np.empty((n, rows.shape[1]))
    for i in range(n):
        sums[i] = np.bincount(generator.integers(size, size=size), minlength=size) @ rows
    return sums


def _bounds(values: NDArray[np.float64], confidence: float) -> tuple[float, float]:
    if not 0 < confidence < 1:
        raise DataError(f"confidence must lie between 0 and 1, got {confidence}")
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
