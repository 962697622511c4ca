"""Image features of image files: what they depend on, where they are kept, and how they are made."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from frozenprefix.data.cache import FeatureCache
from frozenprefix.data.cache_format import StorageDType
from frozenprefix.data.cache_writer import encode_images
from frozenprefix.data.images import BadImages, load_image
from frozenprefix.data.processes import Processes
from frozenprefix.errors import BadImageError
from frozenprefix.models.configuration import VisionEncoderConfig
from frozenprefix.models.modeling import FrozenPrefixForConditionalGeneration
from frozenprefix.models.processing import FrozenPrefixProcessor
from frozenprefix.models.vision import VisionEncoder, build_vision_encoder
from frozenprefix.models.vision.precomputed import FeatureTable, feature_table
from frozenprefix.utils import user_cache

Fingerprint = dict[str, str | int]
Progress = Callable[[int, int], None]


class FeatureOptions(Protocol):
    """Where features are kept ("auto", "off" or a folder), and how. A recipe's `data` section has both."""

    @property
    def feature_cache(self) -> str: ...

    @property
    def feature_dtype(self) -> StorageDType: ...


@dataclass(frozen=True)
class FeatureStorage:
    """`FeatureOptions` without a recipe."""

    feature_cache: str = "auto"
    feature_dtype: StorageDType = "float16"


@dataclass(frozen=True)
class ImageEncoder:
    """The frozen encoder, the image processor that feeds it, and what its features depend on besides the image."""

    module: VisionEncoder
    image_processor: Any
    fingerprint: Fingerprint

    @classmethod
    def build(cls, config: VisionEncoderConfig) -> ImageEncoder:
        """Build the encoder alone, without a language model."""
        built = build_vision_encoder(config)
        return cls(
            built.module, built.image_processor, feature_fingerprint(config, built.identity, built.image_processor)
        )

    @classmethod
    def of(cls, model: FrozenPrefixForConditionalGeneration, processor: FrozenPrefixProcessor) -> ImageEncoder:
        """The encoder of a model."""
        config = model.config.vision_encoder
        identity = model.config.identity["vision_encoder"]
        return cls(
            model.vision_encoder,
            processor.image_processor,
            feature_fingerprint(config, identity, processor.image_processor),
        )

    def pixels(self, image: Image) -> Tensor:
        """RGB image -> float[1, 3, H, W]."""
        return self.image_processor(image, return_tensors="pt")["pixel_values"]

    @property
    def batch_size(self) -> int:
        """Images to encode at once. On CPUs few: a layer's output then stays in the caches until the next reads it
        (EfficientNet-Lite0 in bfloat16 made 230 images/s in eights and 150 in batches of 32)."""
        return 8 if next(self.module.parameters()).device.type == "cpu" else 64

    @torch.inference_mode()
    def encode(self, pixel_values: list[Tensor]) -> np.ndarray:
        """float[1, 3, H, W] each -> float32[n, N, D_enc]."""
        device = next(self.module.parameters()).device
        return self.module(torch.cat(pixel_values).to(device)).float().cpu().numpy()


def feature_fingerprint(config: VisionEncoderConfig, identity: dict[str, str], image_processor: Any) -> Fingerprint:
    """What image features depend on, apart from the image."""
    return {
        **{f"encoder.{k}": json.dumps(v) for k, v in config.feature_fields().items()},
        **{f"weights.{k}": v for k, v in identity.items()},
        "preprocessing": image_processor.to_json_string(),
    }


def feature_folder(options: FeatureOptions, fingerprint: Fingerprint) -> Path:
    """Where features lie. With "auto" it is a folder in the user's cache, named by the fingerprint."""
    if options.feature_cache != "auto":
        return Path(options.feature_cache)
    name = hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()[:16]
    dtype = options.feature_dtype
    return user_cache() / "features" / (name if dtype == "float16" else f"{name}-{dtype}")


def fill_feature_cache(
    encoder: ImageEncoder,
    paths: Sequence[Path],
    options: FeatureOptions,
    *,
    bad: BadImages,
    max_bad_share: float = 0.01,
    workers: int = 2,
    processes: Processes | None = None,
    progress: Progress | None = None,
) -> tuple[FeatureCache | None, int]:
    """Encode what is not in the feature cache yet, each process its share, and open the cache; see `encode_images`.

    Returns:
        The cache (None when not one image could be read), and how many images this process had to encode.
    """
    processes = processes or Processes()
    encoded = 0

    def encode(pixel_values: list[Tensor]) -> np.ndarray:
        nonlocal encoded
        encoded += len(pixel_values)
        return encoder.encode(pixel_values)

    cache = encode_images(
        paths,
        encode,
        feature_folder(options, encoder.fingerprint),
        encoder.fingerprint,
        dtype=options.feature_dtype,
        transform=encoder.pixels,
        batch_size=encoder.batch_size,
        workers=max(1, workers),
        bad=bad,
        max_bad_share=max_bad_share,
        progress=progress,
        rank=processes.rank,
        world_size=processes.count,
        barrier=processes.barrier,
    )
    return cache, encoded


def share_bad_images(bad: BadImages, processes: Processes) -> None:
    """Let every process know the bad images of all: they must leave out the same ones."""
    for path, reason, message in processes.gather([(path, error.reason, str(error)) for path, error in bad]):
        bad.record(path, BadImageError(reason, message))


class ImageFeatures:
    """Features of the images that can be read, by path: from a feature cache, or from memory when it is off.

    Attributes:
        bad: the images that cannot be read.
    """

    def __init__(self, source: FeatureCache | FeatureTable | dict[Path, Tensor], bad: BadImages):
        self._source, self.bad = source, bad

    @classmethod
    def of(
        cls,
        model: FrozenPrefixForConditionalGeneration,
        processor: FrozenPrefixProcessor,
        paths: Sequence[Path],
        options: FeatureOptions,
        *,
        max_bad_share: float = 0.01,
        processes: Processes | None = None,
        progress: Progress | None = None,
    ) -> ImageFeatures:
        """Encode images with a model's encoder, or find their features in the cache or among the given ones.

        A cache serves frozen encoders only. Several processes share the work of filling it; without it each of them
        encodes all images.

        Raises:
            DataError: when more than `max_bad_share` of the images cannot be read.
            CacheError: for a cache folder that is damaged, or was made with another encoder.
        """
        processes = processes or Processes()
        paths, bad = list(dict.fromkeys(paths)), BadImages()
        trainable = any(parameter.requires_grad for parameter in model.vision_encoder.parameters())
        source: FeatureCache | FeatureTable | dict[Path, Tensor]
        given = feature_table(model.vision_encoder)
        if given is not None:
            given.keys_of(paths)
            source = given
        elif options.feature_cache == "off" or trainable:
            source = _encode_in_memory(model, processor, paths, bad, progress)
        else:
            encoder = ImageEncoder.of(model, processor)
            cache, _ = fill_feature_cache(
                encoder,
                paths,
                options,
                bad=bad,
                max_bad_share=max_bad_share,
                processes=processes,
                progress=progress,
            )
            source = {} if cache is None else cache
            share_bad_images(bad, processes)
        bad.check(len(paths), max_bad_share)
        return cls(source, bad)

    def __call__(self, paths: Sequence[Path]) -> Tensor:
        """image_features: float32[n, N, D_enc], in the order asked for."""
        if isinstance(self._source, dict):
            return torch.stack([self._source[path] for path in paths])
        return torch.from_numpy(self._source.get(self._source.keys_of(paths))).float()


@torch.inference_mode()
def _encode_in_memory(
    model: FrozenPrefixForConditionalGeneration,
    processor: FrozenPrefixProcessor,
    paths: Sequence[Path],
    bad: BadImages,
    progress: Progress | None,
) -> dict[Path, Tensor]:
    features: dict[Path, Tensor] = {}
    for start in range(0, len(paths), 32):
        images = {}
        for path in paths[start : start + 32]:
            try:
                images[path] = load_image(path)
            except BadImageError as error:
                bad.record(path, error)
        if images:
            pixel_values = processor.image_processor(list(images.values()), return_tensors="pt")["pixel_values"]
            encoded = model.encode(pixel_values.to(model.device))
            features |= dict(zip(images, encoded.float().cpu(), strict=True))
        if progress is not None:
            progress(min(start + 32, len(paths)), len(paths))
    return features
