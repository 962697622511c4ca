"""CLIPScore and RefCLIPScore: how near a caption is to its image in the space of a contrastive model.

Hessel et al. 2021, "CLIPScore: A Reference-free Evaluation Metric for Image Captioning", equations 1 and 2. The score
depends on the encoder: name it beside every figure (the paper's is OpenAI's CLIP ViT-B/32).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from frozenprefix.errors import DataError

WEIGHT = 2.5
PROMPT = "A photo depicts"
_BATCH = 64


class ContrastiveEncoder(Protocol):
    """Two encoders with one space. They truncate texts (CLIP reads 77 tokens) and preprocess images themselves."""

    def encode_image(self, images: Sequence[Any]) -> Any:
        """n images → float[n, D]."""

    def encode_text(self, texts: Sequence[str]) -> Any:
        """n texts → float[n, D]."""


def clip_score(image_embeds: ArrayLike, text_embeds: ArrayLike, *, weight: float = WEIGHT) -> NDArray[np.float64]:
    """`weight` · max(cos(image, caption), 0) for each pair.

    Args:
        image_embeds, text_embeds: float[N, D] each; they need not be of unit length. The texts that were embedded must
            begin with `PROMPT`; see `embed_captions`.

    Returns:
        float[N], in [0, weight].
    """
    images, texts = _matrix(image_embeds, "image_embeds"), _matrix(text_embeds, "text_embeds")
    if images.shape != texts.shape:
        raise DataError(f"image_embeds and text_embeds must agree, got {list(images.shape)} and {list(texts.shape)}")
    return weight * np.maximum(np.einsum("nd,nd->n", _unit(images), _unit(texts)), 0.0)


def ref_clip_score(
    image_embeds: ArrayLike,
    text_embeds: ArrayLike,
    reference_embeds: Sequence[ArrayLike],
    *,
    weight: float = WEIGHT,
) -> NDArray[np.float64]:
    """Harmonic mean of CLIPScore and of the greatest cosine to a reference caption (at least 0).

    Args:
        reference_embeds: for each of the N captions the embeddings of its references, float[R, D].

    Returns:
        float[N].
    """
    scores, texts = clip_score(image_embeds, text_embeds, weight=weight), _unit(_matrix(text_embeds, "text_embeds"))
    if len(reference_embeds) != len(texts):
        raise DataError(f"reference_embeds must have one entry per caption, {len(texts)}; got {len(reference_embeds)}")
    nearest = np.empty(len(texts))
    for i, embeds in enumerate(reference_embeds):
        references = _matrix(embeds, f"reference_embeds[{i}]")
        if not len(references) or references.shape[1] != texts.shape[1]:
            raise DataError(
                f"reference_embeds[{i}] must be [R, {texts.shape[1]}] with R ≥ 1, got {list(references.shape)}"
            )
        nearest[i] = max(0.0, float((_unit(references) @ texts[i]).max()))
    total = scores + nearest
    return np.divide(2 * scores * nearest, total, out=np.zeros(len(total)), where=total > 0)


def embed_captions(encoder: ContrastiveEncoder, captions: Sequence[str]) -> NDArray[np.float64]:
    """Embed captions or references, each after the metric's prompt."""
    texts = [f"{PROMPT} {caption}" for caption in captions]
    return _in_batches(encoder.encode_text, texts, "encode_text(...)")


def embed_images(encoder: ContrastiveEncoder, images: Sequence[Any]) -> NDArray[np.float64]:
    """Embed images, in any form that the encoder takes."""
    return _in_batches(encoder.encode_image, images, "encode_image(...)")


def _in_batches(encode: Callable[[Sequence[Any]], Any], items: Sequence[Any], name: str) -> NDArray[np.float64]:
    return np.concatenate([_matrix(encode(items[i : i + _BATCH]), name) for i in range(0, len(items), _BATCH)])


def _matrix(values: Any, name: str) -> NDArray[np.float64]:
    """A tensor on any device, or an array, as float64[N, D]."""
    if hasattr(values, "detach"):
        values = values.detach().float().cpu().numpy()
    matrix = np.asarray(values, dtype=np.float64)
    if matrix.ndim != 2:
        raise DataError(f"{name} must be [N, D], got shape {list(matrix.shape)}")
    return matrix


def _unit(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    return matrix / np.maximum(np.linalg.norm(matrix, axis=1, keepdims=True), 1e-12)
