"""Fill the feature cache of a recipe before its training."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator

from frozenprefix.config import resolve_precision
from frozenprefix.config.base_recipe import BaseRecipe
from frozenprefix.data.cache import repair_cache
from frozenprefix.data.cache_format import MANIFEST
from frozenprefix.data.features import feature_folder
from frozenprefix.data.image_encoder import ImageEncoder
from frozenprefix.data.images import BadImages
from frozenprefix.errors import ConfigError, DataError
from frozenprefix.training.setup import load_parts, prepare_images


@dataclass(frozen=True)
class FilledCache:
    """Result of `fill_cache`.

    Attributes:
        images: number of image files of the recipe; bad: those that cannot be read, listed in `bad_list`.
        features: number of images in the folder; encoded: number of those that were added now, in `seconds`.
        bytes: size of the folder, and of those of further views.
        shape: (N, D_enc) of an image's features, stored as `dtype`.
        is_main: whether this is the main process, which reports to the user.
    """

    folder: Path
    images: int
    bad: BadImages
    bad_list: Path
    features: int
    encoded: int
    seconds: float
    bytes: int
    shape: tuple[int, int]
    dtype: str
    is_main: bool


def fill_cache(
    recipe: BaseRecipe, *, repair: bool = False, progress: Callable[[int, int], None] | None = None
) -> FilledCache:
    """Encode every image of a recipe's sources that is not in its feature cache yet.

    Under `accelerate launch` the processes share the images. After a kill, the next call continues.

    Args:
        repair: first set damaged shards aside and rebuild the indexes, see `repair_cache`.
        progress: called with (images done, images in all) of this process.

    Raises:
        ConfigError: when the recipe uses no cache.
        DataError, CacheError: see `prepare_images`.

    Example:
        >>> fill_cache(recipe).images
        12
    """
    if recipe.data.feature_cache == "off":
        raise ConfigError("data.feature_cache: got 'off', expected 'auto' or a folder to encode into")
    if recipe.model.vision_encoder.source == "features":
        raise ConfigError("model.vision_encoder.source: got 'features': precomputed features need no encoding")
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    recipe = resolve_precision(recipe, resumed=recipe.output_dir / "last")
    samples = load_parts(recipe.data)  # first: a wrong path should not cost the loading of the encoder
    encoder = ImageEncoder.from_config(recipe.model.vision_encoder)
    encoder.module.to(accelerator.device)
    folder = feature_folder(recipe.data.feature_storage, encoder.fingerprint)
    if repair and accelerator.is_main_process:
        repair_cache(folder)
        for view in recipe.data.further_views:
            others = feature_folder(recipe.data.feature_storage, replace(encoder, view=view).fingerprint)
            if (others / MANIFEST).exists():
                repair_cache(others)
    accelerator.wait_for_everyone()
    bad_list = folder / "bad_images.jsonl"
    started = time.monotonic()
    prepared = prepare_images(
        encoder,
        samples,
        recipe.data,
        processes=accelerator.state,
        bad_list=bad_list if accelerator.is_main_process else None,
        progress=progress,
    )
    features = prepared.features
    if features is None:
        raise DataError(f"data: not one of {prepared.images} images can be read; {bad_list} lists them")
    return FilledCache(
        folder=folder,
        images=prepared.images,
        bad=prepared.bad,
        bad_list=bad_list,
        features=len(features),
        encoded=prepared.encoded,
        seconds=time.monotonic() - started,
        bytes=sum(folder_bytes(cache.folder) for cache in prepared.view_features or [features]),
        shape=features.manifest.shape,
        dtype=features.manifest.dtype,
        is_main=accelerator.is_main_process,
    )


def folder_bytes(folder: Path) -> int:
    """Bytes of all files of a folder."""
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
