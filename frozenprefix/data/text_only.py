"""Training on texts alone: a text's own vector stands for the image that it describes, as in CapDec."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from frozenprefix.data.collation import Collator
from frozenprefix.data.samples import ImageGroup, Sample
from frozenprefix.errors import ConfigError, DataError
from frozenprefix.models.configuration import VisionEncoderConfig
from frozenprefix.models.contrastive.configuration import TextTowerConfig
from frozenprefix.models.contrastive.text_tower import build_text_tower
from frozenprefix.models.processing import FrozenPrefixProcessor

BATCH = 256  # texts that are encoded at once


class TextVectors:
    """Unit vectors of texts, in the space that an image encoder shares with them, kept in memory in float16.

    Args:
        texts: each at most once; vectors: float[n, D].
    """

    def __init__(self, texts: Sequence[str], vectors: Tensor):
        self._place = {text: place for place, text in enumerate(texts)}
        self._vectors = vectors.half()

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        encoder: VisionEncoderConfig,
        texts: Sequence[str],
        *,
        device: torch.device | str = "cpu",
        progress: Callable[[int, int], None] | None = None,
    ) -> TextVectors:
        """Encode texts with the text tower that belongs to an image encoder; the tower is dropped afterwards.

        Args:
            progress: called with (texts done, texts in all).

        Raises:
            ConfigError: for an encoder without a text tower.
        """
        if encoder.source != "open_clip" or encoder.output != "pooled":
            raise ConfigError(
                f"data.text_only: '{encoder.name}' of source '{encoder.source}' with output '{encoder.output}' has no "
                "text tower in its space; expected source 'open_clip' with output 'pooled'"
            )
        import open_clip

        section = TextTowerConfig(
            source="open_clip", path=encoder.name, weights=encoder.weights, trained_layers=0, max_tokens=77
        )
        tower = build_text_tower(section).module.to(device).eval()
        tokenizer = open_clip.get_tokenizer(encoder.name)
        texts = list(dict.fromkeys(texts))
        vectors = []
        for start in range(0, len(texts), BATCH):
            ids = tokenizer(texts[start : start + BATCH]).to(device)
            vectors.append(F.normalize(tower(ids, torch.ones_like(ids)).float(), dim=-1).half().cpu())
            if progress is not None:
                progress(min(start + BATCH, len(texts)), len(texts))
        # clone: tensors made in inference mode cannot be used in training
        return cls(texts, torch.cat(vectors))

    @property
    def dim(self) -> int:
        return self._vectors.shape[1]

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """image_features in place of the images': unit float32[n, 1, D]."""
        places = [self._place[text] for text in texts]
        return F.normalize(self._vectors[places].float(), dim=-1)[:, None]


class TextOnlyCollator(Collator):
    """Gives every target the vector of its own text in place of its image, which is never read.

    Nukrai et al. 2022, section 3, without the noise: `Objectives` adds it, anew in every step.

    Args:
        vectors: of all targets; options: those of `Collator`.
    """

    def __init__(self, processor: FrozenPrefixProcessor, vectors: TextVectors, **options: Any):
        super().__init__(processor, **options)
        self.vectors = vectors

    def __call__(self, groups: Sequence[ImageGroup], chosen: Sequence[Sequence[tuple[Sample, str]]]) -> dict[str, Any]:
        pairs = [pair for listed in chosen for pair in listed]
        several = next((sample for sample, _ in pairs if len(sample.images) != 1), None)
        if several is not None:
            raise DataError(f"data.text_only: sample '{several.id}' has {len(several.images)} images, expected 1")
        batch: dict[str, Any] = {"image_features": self.vectors([text for _, text in pairs])}
        batch["packed"] = self.pack([[pair] for pair in pairs], [1] * len(pairs))
        if self.keep_samples:
            batch["samples"] = list(zip(groups, chosen, strict=True))
        return batch
