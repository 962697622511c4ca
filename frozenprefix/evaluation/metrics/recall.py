"""Recall@k and ranks of retrieval: images by caption, captions by image."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from frozenprefix.errors import DataError


def first_ranks(similarity: ArrayLike, relevant: Sequence[Collection[int]]) -> NDArray[np.int64]:
    """Rank of each query's best relevant candidate, 1 for the first.

    Ties count against the model, so that equal scores for all candidates give the worst rank.

    Args:
        similarity: float[Q, C], larger is nearer.
        relevant: for each query the columns that are right, at least one.

    Raises:
        DataError: for shapes that do not fit, a column that does not exist, or scores that are NaN.

    Example:
        >>> first_ranks([[0.9, 0.1], [0.8, 0.3]], [[0], [1]]).tolist()
        [1, 2]
    """
    scores = np.asarray(similarity, dtype=np.float64)
    if scores.ndim != 2 or len(scores) != len(relevant):
        raise DataError(
            f"similarity must be [queries, candidates] with one row per entry of relevant, {len(relevant)}; "
            f"got shape {list(scores.shape)}"
        )
    if np.isnan(scores).any():
        raise DataError(f"similarity has {int(np.isnan(scores).sum())} NaN values, expected numbers")
    ranks = np.empty(len(scores), dtype=np.int64)
    for row, columns in enumerate(relevant):
        right = sorted(set(columns))
        if not right or right[0] < 0 or right[-1] >= scores.shape[1]:
            raise DataError(f"relevant[{row}] must name columns from 0 to {scores.shape[1] - 1}, got {right}")
        others = np.delete(scores[row], right)
        ranks[row] = 1 + int((others >= scores[row, right].max()).sum())
    return ranks


def rank_metrics(ranks: ArrayLike, *, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """`recall@k` (share of queries whose first right candidate is among the first k, in [0, 1]), `median_rank` and
    `mean_rank` from `first_ranks`; 1 is the best rank.

    Raises:
        DataError: without queries, or for a k below 1.
    """
    values = np.asarray(ranks)
    if not values.size:
        raise DataError("ranks are empty; expected at least one query")
    if not ks or min(ks) < 1:
        raise DataError(f"ks must be whole numbers ≥ 1, got {list(ks)}")
    recalls = {f"recall@{k}": float((values <= k).mean()) for k in ks}
    return {**recalls, "median_rank": float(np.median(values)), "mean_rank": float(values.mean())}
