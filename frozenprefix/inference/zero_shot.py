"""Zero-shot classification: the label whose texts are nearest to the image (Radford et al. 2021, section 3.1)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from frozenprefix.errors import ConfigError
from frozenprefix.inference.embedding import Embedder

TEMPLATES = ("a photo of a {}.", "an image of a {}.", "there is a {}.", "a {} in the scene.")


@dataclass(frozen=True)
class LabelledImage:
    """An image, its most likely label, and the probability of each label, in the order of the classifier's labels.

    Example:
        >>> LabelledImage(image_path, "red", {"red": 0.75, "blue": 0.25}).label
        'red'
    """

    path: Path
    label: str
    probabilities: dict[str, float]


class ZeroShotClassifier:
    """Labels images by the similarity of their vector to those of the labels' texts.

    Args:
        embedder: a model with images and texts in one space.
        labels: at least two different ones.
        templates: texts with a place for the label, `{}`. A label is the mean of its texts' unit vectors.
        scale: factor of the cosines in the softmax; the model's logit scale gives the probabilities of its training.

    Example:
        >>> from frozenprefix.models.contrastive.heads import ContrastiveHeads
        >>> model.contrastive = ContrastiveHeads(model.lm.dim, dim=8, loss="infonce")
        >>> classifier = ZeroShotClassifier(Embedder(model, processor), ["dog", "cat"])
        >>> classifier.classify([image_path])[0].label in ("dog", "cat")
        True
    """

    def __init__(
        self,
        embedder: Embedder,
        labels: Sequence[str],
        templates: Sequence[str] = TEMPLATES,
        *,
        scale: float = 100.0,
    ):
        wrong = [template for template in templates if "{}" not in template]
        if wrong or not templates:
            raise ConfigError(f"templates: got {wrong or 'none'}, expected texts with a place {{}} for the label")
        if len(labels) < 2 or len(set(labels)) < len(labels):
            raise ConfigError(f"labels: got {list(labels)}, expected at least two, all different")
        self.embedder, self.labels = embedder, list(labels)
        texts = [template.replace("{}", label) for label in labels for template in templates]
        # [labels x templates, D] -> [labels, D]
        means = embedder.embed_texts(texts).reshape(len(labels), len(templates), -1).mean(axis=1)
        self.label_embeds = means / np.linalg.norm(means, axis=1, keepdims=True)
        self.scale = scale

    def classify(self, paths: Iterable[str | Path]) -> list[LabelledImage]:
        """Label image files.

        Raises:
            BadImageError: for an image that cannot be read.
        """
        paths, embeds = self.embedder.embed_images(paths)
        logits = self.scale * embeds @ self.label_embeds.T
        shares = np.exp(logits - logits.max(axis=1, keepdims=True))
        shares /= shares.sum(axis=1, keepdims=True)
        return [
            LabelledImage(path, self.labels[int(row.argmax())], dict(zip(self.labels, row.tolist(), strict=True)))
            for path, row in zip(paths, shares, strict=True)
        ]
