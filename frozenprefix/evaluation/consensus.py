"""Captions by retrieval, without any training: the baseline that a trained mapper must beat.

Devlin et al. 2015, "Exploring Nearest Neighbor Approaches for Image Captioning": of all captions of the nearest
training images, take the one that agrees best with the others.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from frozenprefix.data.neighbours import CaptionVectors, NearestImages, ngram_counts
from frozenprefix.errors import DataError
from frozenprefix.evaluation.metrics.ptb import ptb_tokenize


def consensus_captions(
    query_features: ArrayLike,
    train_features: ArrayLike,
    train_captions: Sequence[Sequence[str]],
    k: int = 15,
    *,
    exclude: Sequence[int | None] | None = None,
) -> list[str]:
    """Return for each query image the training caption that its neighbours agree on.

    Neighbours: largest cosine of features from which the training mean is subtracted. Agreement: mean over the other
    captions of the tf-idf cosine, averaged over n-grams of one to four words, with the inverse document frequencies of
    all training captions. Of equals the caption of the nearest image wins.

    Args:
        query_features: float[Q, D].
        train_features: float[M, D].
        train_captions: the captions of each of the M training images, at least one each.
        k: neighbours per query; with fewer training images than that, all are used.
        exclude: for each query the row of the training image that must not be used, its own, or None.

    Raises:
        DataError: shapes or lengths that do not fit, an image without captions, or nothing left to retrieve from.

    Example:
        >>> train = np.array([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
        >>> consensus_captions(train[:1], train, [["a dog runs"], ["a dog"], ["a cat"]], k=2)
        ['a dog runs']
    """
    # queries: [Q, D], train: [M, D]
    queries, train = np.asarray(query_features, dtype=np.float32), np.asarray(train_features, dtype=np.float32)
    _check(queries, train, train_captions, k, exclude)
    neighbours = NearestImages(train)(queries, k, exclude=exclude)
    texts = [text for captions in train_captions for text in captions]
    first_caption = np.concatenate([[0], np.cumsum([len(captions) for captions in train_captions])])
    vectors = CaptionVectors.from_counts(
        [[ngram_counts(ptb_tokenize(text)) for text in each] for each in train_captions]
    )
    chosen = []
    for row in neighbours:
        candidates = np.concatenate([np.arange(first_caption[i], first_caption[i + 1]) for i in row])
        chosen.append(texts[candidates[np.argmax(vectors.agreement(candidates))]])
    return chosen


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
            f"{list(train.shape)}; pool the features to one vector per image"
        )
    if len(train) != len(train_captions):
        raise DataError(
            f"train_captions must have one list per training image, {len(train)}; got {len(train_captions)}"
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
        raise DataError("no training image is left to retrieve captions from")
