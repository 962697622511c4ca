"""From a recipe to the parts that the loop needs: model, processor, data."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from frozenprefix.assets import user_cache
from frozenprefix.data.cache import FeatureCache
from frozenprefix.data.cache_encode import encode_pictures
from frozenprefix.data.images import BadPictures
from frozenprefix.data.samples import PictureGroup, Sample, check_unique_ids, group_by_pictures
from frozenprefix.data.sources import load_source
from frozenprefix.errors import DataError
from frozenprefix.models.configuration import FrozenPrefixConfig
from frozenprefix.models.language_model import load_tokenizer
from frozenprefix.models.modeling import FrozenPrefixForConditionalGeneration
from frozenprefix.models.processing import FrozenPrefixProcessor
from frozenprefix.models.vision import build_vision_encoder
from frozenprefix.training.recipe import Recipe

logger = logging.getLogger(__name__)


def build_model(recipe: Recipe) -> tuple[FrozenPrefixForConditionalGeneration, FrozenPrefixProcessor]:
    """Build the model of a recipe, and its processor."""
    sections = recipe.model
    encoder = build_vision_encoder(sections.vision_encoder)
    processor = FrozenPrefixProcessor(
        encoder.image_processor,
        load_tokenizer(sections.language_model),
        prefix_length=sections.mapper.prefix_length,
        prompts=recipe.data.prompts,
    )
    config = FrozenPrefixConfig(
        vision_encoder=sections.vision_encoder,
        mapper=sections.mapper,
        language_model=sections.language_model,
        fusion=sections.fusion,
        identity={"vision_encoder": encoder.identity},
        image_token_id=processor.image_token_id,
    )
    torch.manual_seed(recipe.seed)
    return FrozenPrefixForConditionalGeneration(config, vision_encoder=encoder.module), processor


def load_samples(sources: Sequence[Any], part: str) -> list[Sample]:
    """Load and join sources; every sample needs a target.

    Raises:
        DataError: when nothing is left, or two sources share sample ids.
    """
    samples = [sample for source in sources for sample in load_source(source)]
    check_unique_ids(samples)
    if not any(sample.targets for sample in samples):
        raise DataError(f"data.{part}: {len(samples)} samples, none with a target to learn; check path and split")
    return [sample for sample in samples if sample.targets]


def feature_fingerprint(
    model: FrozenPrefixForConditionalGeneration, processor: FrozenPrefixProcessor
) -> dict[str, str | int]:
    """What image features depend on, apart from the picture."""
    section = {k: v for k, v in model.config.vision_encoder.items() if k not in ("weights", "revision")}
    return {
        **{f"encoder.{k}": json.dumps(v) for k, v in section.items()},
        **{f"weights.{k}": v for k, v in model.config.identity["vision_encoder"].items()},
        "preprocessing": processor.image_processor.to_json_string(),
    }


def fingerprint_id(fingerprint: dict[str, str | int]) -> str:
    """A short name for a fingerprint, for folders."""
    return hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()[:16]


@dataclass
class PreparedPictures:
    """Groups whose pictures can be read, the features of their pictures when cached, and what could not be read."""

    groups: dict[str, list[PictureGroup]]
    features: FeatureCache | None


def prepare_pictures(
    model: FrozenPrefixForConditionalGeneration,
    processor: FrozenPrefixProcessor,
    samples: dict[str, list[Sample]],
    *,
    feature_cache: str,
    max_bad_share: float,
    workers: int,
    batch_size: int = 32,
    bad_list: Path | None = None,
    progress: Any = None,
) -> PreparedPictures:
    """Encode every picture once into the feature cache, and drop groups with a picture that cannot be read.

    Args:
        feature_cache: "auto" (a folder in the user's cache, named by the fingerprint), a folder, or "off".
        max_bad_share: more bad pictures than this share stop the run.
        bad_list: JSONL file that lists the bad pictures.

    Raises:
        DataError: when too many pictures are bad.
    """
    groups = {part: group_by_pictures(listed) for part, listed in samples.items()}
    if feature_cache == "off":
        return PreparedPictures(groups, None)
    paths = list(dict.fromkeys(path for listed in groups.values() for group in listed for path in group.images))
    fingerprint = feature_fingerprint(model, processor)
    folder = Path(feature_cache)
    if feature_cache == "auto":
        folder = user_cache() / "features" / fingerprint_id(fingerprint)
    bad = BadPictures()
    try:
        features = encode_pictures(
            paths,
            lambda pictures: encode_pixels(model, pictures),
            folder,
            fingerprint,
            transform=lambda image: processor.image_processor(image, return_tensors="pt")["pixel_values"],
            batch_size=batch_size,
            workers=max(1, workers),
            bad=bad,
            max_bad_share=max_bad_share,
            progress=progress,
        )
    finally:
        if bad_list is not None and len(bad):
            bad.write(bad_list)
    unusable = {Path(path) for path, _ in bad}
    kept = {part: [g for g in listed if not unusable & set(g.images)] for part, listed in groups.items()}
    return PreparedPictures(kept, features)


@torch.inference_mode()
def encode_pixels(model: FrozenPrefixForConditionalGeneration, pixel_values: list[torch.Tensor]) -> np.ndarray:
    """Preprocessed pictures, float[1, 3, H, W] each -> float32[n, N, D_enc]."""
    return model.encode(torch.cat(pixel_values).to(model.device)).float().cpu().numpy()
