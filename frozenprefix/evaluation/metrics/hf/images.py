"""Metrics over embeddings of images and texts."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from datasets import Features

from frozenprefix.errors import ConfigError
from frozenprefix.evaluation.metrics.clip_score import (
    WEIGHT,
    ContrastiveEncoder,
    clip_score,
    embed_captions,
    embed_images,
    ref_clip_score,
)
from frozenprefix.evaluation.metrics.hf.base import COLUMNS, TEXT, VECTOR, OfflineMetric
from frozenprefix.evaluation.metrics.recall import first_ranks, rank_metrics


class ClipScore(OfflineMetric):
    """CLIPScore of captions, and RefCLIPScore with `reference_texts`. Name the encoder beside the figure."""

    inputs: ClassVar = [
        Features({"predictions": VECTOR, "references": VECTOR}),
        Features({"predictions": TEXT, "references": TEXT}),
    ]
    citation_text = "Hessel et al. 2021, CLIPScore: A Reference-free Evaluation Metric for Image Captioning"

    def _compute(
        self,
        predictions: Any,
        references: Any,
        encoder: ContrastiveEncoder | None = None,
        reference_texts: Any = None,
        weight: float = WEIGHT,
    ) -> dict[str, Any]:
        """Give embeddings of captions and of their images; or captions and image files, and as `encoder` an object
        with `encode_text` and `encode_image`. `reference_texts`: for each caption its references, as texts or as
        embeddings. Embedded texts must begin with "A photo depicts"; that is done here when there is an encoder, which
        also decides how long a text may be (77 tokens for CLIP)."""
        if isinstance(predictions[0], str):
            if encoder is None:
                raise ConfigError("clip_score: got captions without an encoder; give encoder=…, or embeddings")
            images, texts = embed_images(encoder, references), embed_captions(encoder, predictions)
            others = reference_texts and [embed_captions(encoder, each) for each in reference_texts]
        else:
            images, texts, others = np.asarray(references), np.asarray(predictions), reference_texts
        scores = clip_score(images, texts, weight=weight)
        result = {"clip_score": float(scores.mean()), "clip_score_each": scores.tolist()}
        if others:
            with_references = ref_clip_score(images, texts, others, weight=weight)
            result |= {
                "ref_clip_score": float(with_references.mean()),
                "ref_clip_score_each": with_references.tolist(),
            }
        return result


class Retrieval(OfflineMetric):
    """Recall@k, median and mean rank."""

    inputs = Features({"predictions": VECTOR, "references": COLUMNS})
    citation_text = ""

    def _compute(self, predictions: Any, references: Any, ks: Any = (1, 5, 10)) -> dict[str, float]:
        """Give for each query its similarity to every candidate, and the places of the right candidates. Ties count
        against the model."""
        return rank_metrics(first_ranks(predictions, references), ks=ks)
