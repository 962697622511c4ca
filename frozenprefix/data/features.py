"""Image features of many image files: where they are kept, and how they get there."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor

from frozenprefix.data.cache import FeatureCache
from frozenprefix.data.cache_format import StorageDType
from frozenprefix.data.cache_writer import encode_images
from frozenprefix.data.image_encoder import Fingerprint, ImageEncoder
from frozenprefix.data.images import BadImages
from frozenprefix.errors import BadImageError
from frozenprefix.models.vision.precomputed import FeatureTable, feature_table
from frozenprefix.utils import content_hash, user_cache

Progress = Callable[[int, int], None]
_IMAGES_AT_ONCE = 32  # encoded into memory


@dataclass(frozen=True)
class FeatureStorage:
    """Where image features are kept, and how.

    Attributes:
        feature_cache: "auto" (a folder in the user's cache), "off", or a folder.
        feature_dtype: "float32", "float16" or "int8".
    """

    feature_cache: str = "auto"
    feature_dtype: StorageDType = "float16"


def feature_folder(storage: FeatureStorage, fingerprint: Fingerprint) -> Path:
    """Folder of the feature cache. With "auto" it is in the user's cache and is named by the fingerprint.

    The features of views other than the whole image are in folders of their own.

    Example:
        >>> feature_folder(FeatureStorage("my/cache"), {"encoder.name": "vit"})
        PosixPath('my/cache')
    """
    if storage.feature_cache != "auto":
        folder = Path(storage.feature_cache)
        return folder / str(fingerprint["view"]) if "view" in fingerprint else folder
    name = content_hash(json.dumps(fingerprint, sort_keys=True))[:16]
    dtype = storage.feature_dtype
    return user_cache() / "features" / (name if dtype == "float16" else f"{name}-{dtype}")


def fill_feature_cache(
    encoder: ImageEncoder,
    paths: Sequence[Path],
    storage: FeatureStorage,
    *,
    bad: BadImages,
    max_bad_share: float = 0.01,
    workers: int = 2,
    processes: PartialState | None = None,
    progress: Progress | None = None,
) -> tuple[FeatureCache | None, int]:
    """Encode the images that the feature cache lacks, each process its share, and open the cache; see `encode_images`.

    Args:
        processes: those that share the work, all of which must call this; None for this one alone.

    Returns:
        The cache (None when not one image could be read), and how many images this process had to encode.
    """
    encoded = 0

    def encode(pixel_values: list[Tensor]) -> np.ndarray:
        nonlocal encoded
        encoded += len(pixel_values)
        return encoder.encode(torch.cat(pixel_values)).cpu().numpy()

    fingerprint = encoder.fingerprint
    sharing: dict[str, Any] = {}
    if processes is not None:
        sharing = {"rank": processes.process_index, "world_size": processes.num_processes}
        sharing["barrier"] = processes.wait_for_everyone
    cache = encode_images(
        paths,
        encode,
        feature_folder(storage, fingerprint),
        fingerprint,
        dtype=storage.feature_dtype,
        transform=lambda image: encoder.pixel_values([image]),
        batch_size=encoder.batch_size,
        workers=max(1, workers),
        bad=bad,
        max_bad_share=max_bad_share,
        progress=progress,
        **sharing,
    )
    return cache, encoded


def share_bad_images(bad: BadImages) -> None:
    """Let every process know the bad images of all: they must leave out the same ones."""
    for path, reason, message in gather_object([(path, error.reason, str(error)) for path, error in bad]):
        bad.record(path, BadImageError(reason, message))


class ImageFeatures:
    """Features of images that can be read, by path: from a feature cache, a feature table, or memory.

    Attributes:
        bad: the images that cannot be read.
    """

    def __init__(self, source: FeatureCache | FeatureTable | dict[Path, Tensor], bad: BadImages):
        self._source, self.bad = source, bad

    @classmethod
    def from_encoder(
        cls,
        encoder: ImageEncoder,
        paths: Sequence[Path],
        storage: FeatureStorage,
        *,
        max_bad_share: float = 0.01,
        processes: PartialState | None = None,
        progress: Progress | None = None,
    ) -> ImageFeatures:
        """Encode images, or find their features in the cache or in the feature table.

        A cache serves frozen encoders only. The `processes`, if given, share the work of filling it; without a cache
        each of them encodes all images.

        Raises:
            DataError: when more than `max_bad_share` of the images cannot be read.
            CacheError: for a cache folder that is damaged, or was written with another encoder.

        Example:
            >>> encoder = ImageEncoder.from_model(model, processor)
            >>> features = ImageFeatures.from_encoder(encoder, [image_path], FeatureStorage("off"))
            >>> features([image_path]).shape
            torch.Size([1, 4, 64])
        """
        paths, bad = list(dict.fromkeys(paths)), BadImages()
        trainable = any(parameter.requires_grad for parameter in encoder.module.parameters())
        source: FeatureCache | FeatureTable | dict[Path, Tensor]
        table = feature_table(encoder.module)
        if table is not None:
            table.keys_of(paths)
            source = table
        elif storage.feature_cache == "off" or trainable:
            source = _encode_in_memory(encoder, paths, bad, progress)
        else:
            cache, _ = fill_feature_cache(
                encoder, paths, storage, bad=bad, max_bad_share=max_bad_share, processes=processes, progress=progress
            )
            source = {} if cache is None else cache
            if processes is not None:
                share_bad_images(bad)
        bad.check(len(paths), max_bad_share)
        return cls(source, bad)

    def __call__(self, paths: Sequence[Path]) -> Tensor:
        """image_features: float32[n, N, D_enc], in the order asked for."""
        if isinstance(self._source, dict):
            return torch.stack([self._source[path] for path in paths])
        return torch.from_numpy(self._source.get(self._source.keys_of(paths))).float()


def _encode_in_memory(
    encoder: ImageEncoder, paths: Sequence[Path], bad: BadImages, progress: Progress | None
) -> dict[Path, Tensor]:
    features: dict[Path, Tensor] = {}
    for files, encoded in encoder.batches(paths, _IMAGES_AT_ONCE, bad):
        features |= zip(map(Path, files), encoded.cpu(), strict=True)  # type: ignore[arg-type]
        if progress is not None:
            progress(len(features) + len(bad), len(paths))
    return features
