"""Retrieval in both directions: Recall@k and median rank, beside chance and shuffled images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import lgamma
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.utils import gather_object

from frozenprefix.data.images import BadImages
from frozenprefix.data.samples import ImageGroup, Sample, check_unique_ids, group_by_images, with_targets
from frozenprefix.errors import ConfigError, DataError
from frozenprefix.evaluation.result import ScoredTask, result_of
from frozenprefix.evaluation.scoring import Scorer, Scores
from frozenprefix.evaluation.task import EvaluationOptions, EvaluationTask, check_options
from frozenprefix.inference.embedding import Embedder
from frozenprefix.inference.image_index import nearest

OPTIONS = ("recall_at",)
RECALL_AT = (1, 5, 10)
TEXT_TO_IMAGE, IMAGE_TO_TEXT = "text_to_image", "image_to_text"
_ROWS = 1024  # queries compared at once
_SHOWN = 3  # images that a prediction names


def evaluate_retrieval(
    embedder: Embedder, samples: Sequence[Sample], options: EvaluationOptions, *, recall_at: Sequence[int] = RECALL_AT
) -> dict[str, Any]:
    """Find each text's image among all images, and each image's texts among all texts.

    A sample of the result, and a row of the predictions, is an image with all its texts. Intervals draw images; what
    is searched stays. Of several processes the main one does all the work.

    Args:
        embedder: a model with images and texts in one space.
        samples: images with their texts as targets; samples of the same image belong together.

    Returns:
        As `EvaluationTask.run` says. Baselines are "chance", which is computed, and "shuffled", where the images'
        vectors are handed to other images. A prediction has `image_ranks`, the rank of the image for each of its
        texts, `text_rank`, that of the best of them for the image, `images`, the ids of the first three images
        found for the first text, and `text`, the first text found for the image.

    Raises:
        ConfigError: for a `recall_at` that is no list of numbers from 1.
        DataError: for samples without text, with several images, or fewer than two images.
    """
    if not isinstance(recall_at, list | tuple) or not recall_at or any(type(k) is not int or k < 1 for k in recall_at):
        raise ConfigError(f"recall_at: got {recall_at!r}, expected a list of whole numbers from 1, such as [1, 5, 10]")
    groups = group_by_images(with_targets(samples, where="task 'retrieval'"))
    if any(len(group.images) != 1 for group in groups):
        raise DataError("retrieval: got samples with several images or none, expected one image each")
    check_unique_ids(_as_sample(group) for group in groups)
    result = [_evaluate(embedder, groups, options, recall_at)] if options.processes.is_main_process else []
    return gather_object(result)[0]


def _run(embedder: Embedder, samples: Sequence[Sample], options: EvaluationOptions) -> dict[str, Any]:
    check_options("retrieval", options.extra, OPTIONS)
    return evaluate_retrieval(embedder, samples, options, **options.extra)


def _load_embedder(checkpoint: str | Path, device: str | None) -> Embedder:
    return Embedder.from_pretrained(checkpoint, device=device)


RETRIEVAL = EvaluationTask(_run, sample_task="caption", load=_load_embedder)


def _as_sample(group: ImageGroup) -> Sample:
    """An image with all its texts, named after its first sample."""
    return Sample(group.samples[0].id, group.images, tuple(text for s in group.samples for text in s.targets))


def _evaluate(
    embedder: Embedder, groups: Sequence[ImageGroup], options: EvaluationOptions, recall_at: Sequence[int]
) -> dict[str, Any]:
    bad = BadImages()
    paths, images = embedder.embed_images([group.images[0] for group in groups], bad)
    bad.check(len(groups), options.max_bad_share)
    readable = set(paths)
    groups = [group for group in groups if group.images[0] in readable]
    if len(groups) < 2:
        raise DataError(f"retrieval: got {len(groups)} images with texts, expected at least 2")
    texts, owner = texts_of(groups)
    embeds = embedder.embed_texts(texts)
    rows = [_as_sample(group) for group in groups]
    scored = ScoredTask(
        "retrieval",
        rows,
        retrieval_scorer(recall_at),
        {"recall_at": list(recall_at), "texts": len(texts)},
        bad,
        chance=chance_metrics(owner, len(rows), recall_at),
    )
    others = np.roll(images, len(images) // 2, axis=0)
    runs = {"model": images, "shuffled": others}
    made = {name: _found(vectors, embeds, owner, rows, texts) for name, vectors in runs.items()}
    return result_of(scored, made, options.predictions)


def _found(
    images: np.ndarray, embeds: np.ndarray, owner: np.ndarray, rows: Sequence[Sample], texts: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Sample id → what is found for the image and its texts; see `evaluate_retrieval`."""
    ranks = ranks_both_ways(images, embeds, owner)
    _, first_text = np.unique(owner, return_index=True)
    found_images = _places(embeds[first_text], images, min(_SHOWN, len(images)))
    found_text = _places(images, embeds, 1)[:, 0]
    return {
        row.id: {
            "image_ranks": ranks[TEXT_TO_IMAGE][owner == i].tolist(),
            "text_rank": int(ranks[IMAGE_TO_TEXT][i]),
            "images": [rows[place].id for place in found_images[i]],
            "text": texts[found_text[i]],
        }
        for i, row in enumerate(rows)
    }


def _places(queries: np.ndarray, items: np.ndarray, k: int) -> np.ndarray:
    """Places of the k best items of each query: int64[Q, k]."""
    return np.concatenate([nearest(queries[i : i + _ROWS], items, k)[1] for i in range(0, len(queries), _ROWS)])


def retrieval_scorer(recall_at: Sequence[int]) -> Scorer:
    """Recall@k and median ranks from the ranks in predictions. A text finds its image or does not: the score of a
    sample is the share of its texts, and the metric is over all texts, however many an image has."""

    def score(made: Mapping[str, Any]) -> Scores:
        of_texts = {key: np.array(found["image_ranks"]) for key, found in made.items()}
        of_images = {key: found["text_rank"] for key, found in made.items()}
        ranks = {
            TEXT_TO_IMAGE: np.concatenate(list(of_texts.values())),
            IMAGE_TO_TEXT: np.array(list(of_images.values())),
        }
        per_sample: dict[str, dict[str, float]] = {key: {} for key in made}
        statistics: dict[str, dict[str, list[int]]] = {}
        for k in recall_at:
            by_text, by_image = f"{TEXT_TO_IMAGE}_recall@{k}", f"{IMAGE_TO_TEXT}_recall@{k}"
            statistics[by_text] = {key: [int((found <= k).sum()), len(found)] for key, found in of_texts.items()}
            for key, (part, whole) in statistics[by_text].items():
                per_sample[key] |= {by_text: part / whole, by_image: float(of_images[key] <= k)}
        return Scores(rank_metrics(ranks, recall_at), per_sample=per_sample, statistics=statistics)

    return score


def texts_of(groups: Sequence[ImageGroup]) -> tuple[list[str], np.ndarray]:
    """All texts, and for each the place of its image's group: int64[T]."""
    pairs = [(text, i) for i, group in enumerate(groups) for s in group.samples for text in s.targets]
    return [text for text, _ in pairs], np.array([i for _, i in pairs], dtype=np.int64)


def retrieval_metrics(
    images: np.ndarray, texts: np.ndarray, owner: np.ndarray, recall_at: Sequence[int] = RECALL_AT
) -> dict[str, float]:
    """Recall@k (share of queries with a right answer among the first k) and median rank of the first right answer.

    Args:
        images: unit vectors float[P, D]; texts: float[T, D]; owner: int64[T], the row of each text's image.
    """
    return rank_metrics(ranks_both_ways(images, texts, owner), recall_at)


def ranks_both_ways(images: np.ndarray, texts: np.ndarray, owner: np.ndarray) -> dict[str, np.ndarray]:
    """Direction → rank of each query's best right answer: of T texts among images, of P images among texts."""
    places = np.arange(len(images))
    return {
        TEXT_TO_IMAGE: first_ranks(texts, images, owner, places),
        IMAGE_TO_TEXT: first_ranks(images, texts, places, owner),
    }


def rank_metrics(ranks: Mapping[str, np.ndarray], recall_at: Sequence[int]) -> dict[str, float]:
    """Recall@k and median rank of each direction."""
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


def chance_metrics(owner: np.ndarray, num_images: int, recall_at: Sequence[int] = RECALL_AT) -> dict[str, float]:
    """What a random order reaches, computed: the mean recalls, and the rank that half of all queries reach."""
    counts = np.bincount(owner, minlength=num_images)
    metrics: dict[str, float] = {}
    for direction, total, right in (
        (TEXT_TO_IMAGE, num_images, np.ones(1, dtype=np.int64)),
        (IMAGE_TO_TEXT, len(owner), counts),
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
