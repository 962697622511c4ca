"""Retrieval in both directions: Recall@k and median rank, beside chance and shuffled images."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from math import lgamma
from typing import Any

import numpy as np
from accelerate.utils import gather_object

from frozenprefix.data.images import BadImages
from frozenprefix.data.samples import ImageGroup, Sample, check_unique_ids, group_by_images, with_targets
from frozenprefix.errors import ConfigError, DataError
from frozenprefix.evaluation.metrics.recall import first_ranks, rank_metrics
from frozenprefix.evaluation.result import ScoredTask, result_of
from frozenprefix.evaluation.scoring import Scorer, Scores
from frozenprefix.evaluation.task import EvaluationOptions, EvaluationTask, check_options
from frozenprefix.inference.embedding import Embedder
from frozenprefix.inference.image_index import nearest

OPTIONS = ("recall_at",)
RECALL_AT = (1, 5, 10)
TEXT_TO_IMAGE, IMAGE_TO_TEXT = "text_to_image", "image_to_text"
_ROWS = 1024  # queries compared at once
_LISTED = 3  # images that a prediction names


def evaluate_retrieval(
    embedder: Embedder, samples: Sequence[Sample], options: EvaluationOptions, *, recall_at: Sequence[int] = RECALL_AT
) -> dict[str, Any]:
    """Find each text's image among all images, and each image's texts among all texts.

    A sample of the result, and a row of the predictions, is an image with all its texts. The bootstrap of intervals
    draws queries only. With several processes the main one does all the work.

    Args:
        embedder: a model with images and texts in one space.
        samples: images with their texts as targets; samples of the same image belong together.

    Returns:
        As `EvaluationTask.run` says. Baselines are "chance", which is computed, and "shuffled", where the images'
        vectors are swapped. A prediction has `image_ranks`, the rank of the image for each of its texts; `text_rank`,
        the rank of the image's best text; `images`, the ids of the three images nearest to the first text; and `text`,
        the text nearest to the image.

    Raises:
        ConfigError: for a `recall_at` that is not a list of numbers from 1.
        DataError: for samples without text, with several images, or fewer than two images.

    Example:
        >>> from frozenprefix.models.contrastive.heads import ContrastiveHeads
        >>> model.contrastive = ContrastiveHeads(model.lm.dim, dim=8, loss="infonce")
        >>> samples = [Sample(file.name, (file,), (file.stem,)) for file in sorted(images_folder.iterdir())]
        >>> options = EvaluationOptions(tmp_path / "predictions.jsonl")
        >>> round(evaluate_retrieval(Embedder(model, processor), samples, options)["baselines"]["chance"][
        ...     "text_to_image_recall@1"], 3)
        0.083
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


RETRIEVAL = EvaluationTask(_run, sample_task="caption", load=Embedder.from_pretrained)


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
    predictions = {name: _predictions(vectors, embeds, owner, rows, texts) for name, vectors in runs.items()}
    return result_of(scored, predictions, options.predictions)


def _predictions(
    images: np.ndarray, embeds: np.ndarray, owner: np.ndarray, rows: Sequence[Sample], texts: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Sample id → prediction; see `evaluate_retrieval`."""
    ranks = ranks_both_ways(images, embeds, owner)
    _, first_text = np.unique(owner, return_index=True)
    nearest_images = _places(embeds[first_text], images, min(_LISTED, len(images)))
    nearest_text = _places(images, embeds, 1)[:, 0]
    return {
        row.id: {
            "image_ranks": ranks[TEXT_TO_IMAGE][owner == i].tolist(),
            "text_rank": int(ranks[IMAGE_TO_TEXT][i]),
            "images": [rows[place].id for place in nearest_images[i]],
            "text": texts[nearest_text[i]],
        }
        for i, row in enumerate(rows)
    }


def _places(queries: np.ndarray, items: np.ndarray, k: int) -> np.ndarray:
    """Places of the k best items of each query: int64[Q, k]."""
    return np.concatenate([nearest(queries[i : i + _ROWS], items, k)[1] for i in range(0, len(queries), _ROWS)])


def retrieval_scorer(recall_at: Sequence[int]) -> Scorer:
    """Recall@k and median ranks from the ranks in predictions.

    From text to image, a sample's score is the share of its texts whose image is among the first k; the metric is the
    share over all texts, however many each image has.
    """

    def score(predictions: Mapping[str, Any]) -> Scores:
        of_texts = {key: np.array(row["image_ranks"]) for key, row in predictions.items()}
        of_images = {key: row["text_rank"] for key, row in predictions.items()}
        ranks = {
            TEXT_TO_IMAGE: np.concatenate(list(of_texts.values())),
            IMAGE_TO_TEXT: np.array(list(of_images.values())),
        }
        per_sample: dict[str, dict[str, float]] = {key: {} for key in predictions}
        statistics: dict[str, dict[str, list[int]]] = {}
        for k in recall_at:
            by_text, by_image = f"{TEXT_TO_IMAGE}_recall@{k}", f"{IMAGE_TO_TEXT}_recall@{k}"
            statistics[by_text] = {key: [int((values <= k).sum()), len(values)] for key, values in of_texts.items()}
            for key, (part, whole) in statistics[by_text].items():
                per_sample[key] |= {by_text: part / whole, by_image: float(of_images[key] <= k)}
        return Scores(metrics_both_ways(ranks, recall_at), per_sample=per_sample, statistics=statistics)

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

    Example:
        >>> retrieval_metrics(np.eye(2), np.eye(2), np.array([0, 1]), recall_at=[1])["text_to_image_recall@1"]
        1.0
    """
    return metrics_both_ways(ranks_both_ways(images, texts, owner), recall_at)


def ranks_both_ways(images: np.ndarray, texts: np.ndarray, owner: np.ndarray) -> dict[str, np.ndarray]:
    """Direction → rank of each query's best right answer: of T texts among images, of P images among texts."""
    return {
        TEXT_TO_IMAGE: _ranks(texts, images, [[row] for row in owner]),
        IMAGE_TO_TEXT: _ranks(images, texts, [np.flatnonzero(owner == row) for row in range(len(images))]),
    }


def _ranks(queries: np.ndarray, items: np.ndarray, relevant: Sequence[Collection[int]]) -> np.ndarray:
    """`first_ranks` of the products of queries and items, a few rows at a time."""
    chunks = [slice(start, start + _ROWS) for start in range(0, len(queries), _ROWS)]
    return np.concatenate([first_ranks(queries[rows] @ items.T, relevant[rows]) for rows in chunks])


def metrics_both_ways(ranks: Mapping[str, np.ndarray], recall_at: Sequence[int]) -> dict[str, float]:
    """Recall@k and median rank of each direction."""
    return {
        f"{direction}_{name}": value
        for direction, values in ranks.items()
        for name, value in rank_metrics(values, ks=recall_at).items()
        if name != "mean_rank"
    }


def chance_metrics(owner: np.ndarray, num_images: int, recall_at: Sequence[int] = RECALL_AT) -> dict[str, float]:
    """Expected scores of a random order: the mean recalls, and the rank within which half of all queries succeed."""
    counts = np.bincount(owner, minlength=num_images)
    metrics: dict[str, float] = {}
    for direction, total, right in (
        (TEXT_TO_IMAGE, num_images, np.ones(1, dtype=np.int64)),
        (IMAGE_TO_TEXT, len(owner), counts),
    ):
        kinds, share = np.unique(right, return_counts=True)
        weights = share / share.sum()

        def recall(k: int, total: int = total, kinds: np.ndarray = kinds, weights: np.ndarray = weights) -> float:
            return float(sum(w * _hit(total, int(c), k) for c, w in zip(kinds, weights, strict=True)))

        metrics |= {f"{direction}_recall@{k}": recall(k) for k in recall_at}
        low, high = 1, total
        while low < high:  # recall() rises with k
            middle = (low + high) // 2
            low, high = (low, middle) if recall(middle) >= 0.5 else (middle + 1, high)
        metrics[f"{direction}_median_rank"] = float(low)
    return metrics


def _hit(total: int, right: int, k: int) -> float:
    """Probability that `k` of `total` items, drawn at random, contain one of the `right` ones."""
    if right + k > total:
        return 1.0
    # 1 - C(total - right, k) / C(total, k)
    log = lgamma(total - right + 1) - lgamma(total - right - k + 1) - lgamma(total + 1) + lgamma(total - k + 1)
    return 1.0 - float(np.exp(log))
