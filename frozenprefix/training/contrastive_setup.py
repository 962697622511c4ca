"""Model and batches of a contrastive recipe."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch

from frozenprefix.config.contrastive import ContrastiveRecipe
from frozenprefix.data.cache import FeatureCache
from frozenprefix.data.collation import Collator
from frozenprefix.data.samples import ImageGroup, Sample
from frozenprefix.models.contrastive.configuration import LockedImageTextConfig
from frozenprefix.models.contrastive.modeling import LockedImageTextModel
from frozenprefix.models.contrastive.processing import LockedImageTextProcessor, OpenClipProcessor
from frozenprefix.models.contrastive.text_tower import build_text_tower
from frozenprefix.models.vision import build_vision_encoder

Processor: TypeAlias = LockedImageTextProcessor | OpenClipProcessor


def build_locked_model(recipe: ContrastiveRecipe) -> tuple[LockedImageTextModel, Processor]:
    """Build the model of a recipe, and its processor."""
    sections = recipe.model
    encoder, tower = build_vision_encoder(sections.vision_encoder), build_text_tower(sections.text_tower)
    config = LockedImageTextConfig(
        vision_encoder=sections.vision_encoder,
        text_tower=sections.text_tower,
        image_projection=sections.image_projection,
        text_projection=sections.text_projection,
        projection_dim=sections.projection_dim,
        objective=sections.objective,
        identity={"vision_encoder": encoder.identity, "text_tower": tower.identity},
        text_config=tower.text_config,
    )
    torch.manual_seed(recipe.seed)
    model = LockedImageTextModel(config, encoder.module, tower.module)
    if tower.tokenizer is None:
        return model, OpenClipProcessor(encoder.image_processor, open_clip_name=sections.text_tower.path)
    return model, LockedImageTextProcessor(encoder.image_processor, tower.tokenizer)


class ContrastiveCollator:
    """Turns images and their chosen texts into a batch.

    Args:
        processor: of the model.
        features: features made earlier; images are decoded when there are none.
        texts_per_chunk: texts go through the tower sorted by length, so many at a time: less padding, less memory.
    """

    def __init__(self, processor: Any, features: FeatureCache | None, texts_per_chunk: int):
        self.processor, self.features, self.texts_per_chunk = processor, features, texts_per_chunk
        self.image_inputs = Collator(processor, features).image_inputs

    def __call__(self, groups: Sequence[ImageGroup], chosen: Sequence[Sequence[tuple[Sample, str]]]) -> dict[str, Any]:
        """Returns the images' inputs, `texts` (a list of chunks), `image_ids` int64[P] and `text_ids` int64[T]."""
        ids = [_image_id(group) for group in groups]
        pairs = [(text, ids[i]) for i, picked in enumerate(chosen) for _, text in picked]
        pairs.sort(key=lambda pair: len(pair[0]))
        chunks = [pairs[i : i + self.texts_per_chunk] for i in range(0, len(pairs), self.texts_per_chunk)]
        return {
            **self.image_inputs([group.images[0] for group in groups]),
            "texts": [self.processor.prepare_texts([text for text, _ in chunk]) for chunk in chunks],
            "image_ids": torch.tensor(ids),
            "text_ids": torch.tensor([number for _, number in pairs]),
        }


def _image_id(group: ImageGroup) -> int:
    """The same number for the same image on every process."""
    digest = hashlib.blake2b(str(Path(group.images[0])).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)
