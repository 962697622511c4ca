"""Training on texts alone: a text's own vector takes the place of the image's, as in CapDec (Nukrai et al. 2022)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from frozenprefix.data.collation import Collator
from frozenprefix.data.samples import ImageGroup, Sample
from frozenprefix.errors import ConfigError, DataError
from frozenprefix.models.contrastive.configuration import TextTowerConfig
from frozenprefix.models.contrastive.text_tower import build_text_tower
from frozenprefix.models.encoder_configuration import OpenClipEncoderConfig, VisionEncoderConfig
from frozenprefix.models.processing import FrozenPrefixProcessor

BATCH = 256  # texts that are encoded at once


class TextVectors:
    """Unit vectors of texts, in the space that an image encoder shares with them; in memory, as float16.

    Args:
        texts: each at most once.
        vectors: float[n, D].

    Example:
        >>> TextVectors(["a dog"], torch.tensor([[3.0, 4.0]]))(["a dog"]).shape
        torch.Size([1, 1, 2])
    """

    def __init__(self, texts: Sequence[str], vectors: Tensor):
        self._place = {text: place for place, text in enumerate(texts)}
        self._vectors = vectors.half()

    @classmethod
    @torch.no_grad()
    def from_texts(
        cls,
        encoder: VisionEncoderConfig,
        texts: Sequence[str],
        *,
        device: torch.device | str = "cpu",
        progress: Callable[[int, int], None] | None = None,
    ) -> TextVectors:
        """Encode texts with the text tower of an image encoder; the tower is freed afterwards.

        Args:
            progress: called with (texts done, texts in total).

        Raises:
            ConfigError: for an encoder without a text tower.
        """
        if not isinstance(encoder, OpenClipEncoderConfig) or encoder.output != "pooled":
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
        return cls(texts, torch.cat(vectors))

    @property
    def dim(self) -> int:
        return self._vectors.shape[1]

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Vectors to use as image features: unit float32[n, 1, D]."""
        places = [self._place[text] for text in texts]
        return F.normalize(self._vectors[places].float(), dim=-1)[:, None]


class TextOnlyCollator(Collator):
    """Uses the vector of every target's own text instead of its image, which is never read.

    Nukrai et al. 2022, section 3. The noise is added in every step by the objective.

    Args:
        vectors: of all targets.
        options: of `Collator`.

    Example:
        >>> collator = TextOnlyCollator(processor, TextVectors(["a dog"], torch.ones(1, 4)))
        >>> sample = Sample("1", (image_path,), ("a dog",))
        >>> collator([ImageGroup(sample.images, (sample,))], [[(sample, "a dog")]])["image_features"].shape
        torch.Size([1, 1, 4])
    """

    def __init__(self, processor: FrozenPrefixProcessor, vectors: TextVectors, **options: Any):
        super().__init__(processor, **options)
        self.vectors = vectors

    def __call__(
        self,
        groups: Sequence[ImageGroup],
        chosen: Sequence[Sequence[tuple[Sample, str]]],
        image_inputs: dict[str, torch.Tensor] | None = None,
    ) -> dict[str, Any]:
        """As `Collator.__call__`; `image_inputs` are not used."""
        pairs = [pair for listed in chosen for pair in listed]
        for sample, _ in pairs:
            if len(sample.images) != 1:
                raise DataError(f"data.text_only: {sample.label} has {len(sample.images)} images, expected 1")
        batch: dict[str, Any] = {"image_features": self.vectors([text for _, text in pairs])}
        batch["packed"] = self.pack([[pair] for pair in pairs], [1] * len(pairs))
        if self.keep_samples:
            batch["samples"] = list(zip(groups, chosen, strict=True))
        return batch
