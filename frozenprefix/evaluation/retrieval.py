"""Retrieval in both directions: Recall@k and median rank, beside chance and shuffled pictures."""

from __future__ import annotations

from collections.abc import Sequence
from math import lgamma
from typing import Any

import numpy as np

from frozenprefix.data.images import BadPictures
from frozenprefix.data.samples import PictureGroup, Sample, group_by_pictures
from frozenprefix.errors import DataError
from frozenprefix.inference.embedding import Embedder

RECALL_AT = (1, 5, 10)
_ROWS = 1024  # queries compared at once


def evaluate_retrieval(
    embedder: Embedder,
    samples: Sequence[Sample],
    *,
    recall_at: Sequence[int] = RECALL_AT,
    max_bad_share: float = 0.01,
) -> dict[str, Any]:
    """Find each text's picture among all pictures, and each picture's texts among all texts.

    Args:
        embedder: a model with pictures and texts in one space.
        samples: pictures with their texts as targets; samples of the same picture belong together.
        max_bad_share: share of pictures, 0 to 1, that may be unreadable.

    Returns:
        `{"task", "metrics", "baselines", "n", "groups", "bad_pictures", "settings"}`; baselines are "chance", which
        is computed, and "shuffled", where the pictures' vectors are handed to other pictures.

    Raises:
        DataError: for samples without text, with several pictures, or fewer than two pictures.
    """
    groups = [group for group in group_by_pictures(samples) if any(sample.targets for sample in group.samples)]
    if any(len(group.images) != 1 for group in groups):
        raise DataError("retrieval: got samples with several pictures or none, expected one picture each")
    bad = BadPictures()
    paths, pictures = embedder.embed_pictures([group.images[0] for group in groups], bad)
    bad.check(len(groups), max_bad_share)
    readable = set(paths)
    groups = [group for group in groups if group.images[0] in readable]
    if len(groups) < 2:
        raise DataError(f"retrieval: got {len(groups)} pictures with texts, expected at least 2")
    texts, owner = texts_of(groups)
    embeds = embedder.embed_texts(texts)
    half = len(pictures) // 2
    return {
        "task": "retrieval",
        "metrics": retrieval_metrics(pictures, embeds, owner, recall_at),
        "baselines": {
            "chance": chance_metrics(owner, len(pictures), recall_at),
            "shuffled": retrieval_metrics(np.roll(pictures, half, axis=0), embeds, owner, recall_at),
        },
        "n": len(groups),
        "groups": {},
        "bad_pictures": bad.counts,
        "settings": {"recall_at": list(recall_at), "texts": len(texts)},
    }


def texts_of(groups: Sequence[PictureGroup]) -> tuple[list[str], np.ndarray]:
    """All texts, and for each the place of its picture's group: int64[T]."""
    pairs = [(text, i) for i, group in enumerate(groups) for s in group.samples for text in s.targets]
    return [text for text, _ in pairs], np.array([i for _, i in pairs], dtype=np.int64)


def retrieval_metrics(
    pictures: np.ndarray, texts: np.ndarray, owner: np.ndarray, recall_at: Sequence[int] = RECALL_AT
) -> dict[str, float]:
    """Recall@k (share of queries with a right answer among the first k) and median rank of the first right answer.

    Args:
        pictures: unit vectors float[P, D]; texts: float[T, D]; owner: int64[T], the row of each text's picture.
    """
    places = np.arange(len(pictures))
    ranks = {
        "text_to_picture": first_ranks(texts, pictures, owner, places),
        "picture_to_text": first_ranks(pictures, texts, places, owner),
    }
    metrics: dict[str, float] = {}
    for direction, found in ranks.items():
        metrics |= {f"{direction}_recall@{k}": float((found <= k).mean()) for k in recall_at}
        metrics[f"{direction}_median_rank"] = float(np.median(found))
    return metrics


def first_ranks(queries: np.ndarray, items: np.ndarray, query_ids: np.ndarray, item_ids: np.ndarray) -> np.ndarray:
    """Rank, from 1, of each query's best item with the query's id.

    An item with another id and the same score comes first, or a model that gives the same vector for everything would
    be always right.
    """
    ranks = []
    for start in range(0, len(queries), _ROWS):
        rows = slice(start, start + _ROWS)
        scores = queries[rows] @ items.T
        right = query_ids[rows, None] == item_ids[None, :]
        best = np.where(right, scores, -np.inf).max(axis=1, keepdims=True)
        ranks.append(1 + ((scores >= best) & ~right).sum(axis=1))
    return np.concatenate(ranks)


def chance_metrics(owner: np.ndarray, num_pictures: int, recall_at: Sequence[int] = RECALL_AT) -> dict[str, float]:
    """What a random order reaches, computed: the mean recalls, and the rank that half of all queries reach."""
    counts = np.bincount(owner, minlength=num_pictures)
    metrics: dict[str, float] = {}
    for direction, total, right in (
        ("text_to_picture", num_pictures, np.ones(1, dtype=np.int64)),
        ("picture_to_text", len(owner), counts),
    ):
        kinds, share = np.unique(right, return_counts=True)
        weights = share / share.sum()

        def found(k: int, total: int = total, kinds: np.ndarray = kinds, weights: np.ndarray = weights) -> float:
            return float(sum(w * _hit(total, int(c), k) for c, w in zip(kinds, weights, strict=True)))

        metrics |= {f"{direction}_recall@{k}": found(k) for k in recall_at}
        low, high = 1, total
        while low < high:  # found() rises with k
            middle = (low + high) // 2
            low, high = (low, middle) if found(middle) >= 0.5 else (middle + 1, high)
        metrics[f"{direction}_median_rank"] = float(low)
    return metrics


def _hit(total: int, right: int, k: int) -> float:
    """Probability that `k` of `total` items, drawn at random, hold one of the `right` ones."""
    if right + k > total:
        return 1.0
    # 1 - C(total - right, k) / C(total, k)
    log = lgamma(total - right + 1) - lgamma(total - right - k + 1) - lgamma(total + 1) + lgamma(total - k + 1)
    return 1.0 - float(np.exp(log))
