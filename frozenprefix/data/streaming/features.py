"""Features that come with the samples of shards, in place of images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from frozenprefix.data.cache import FeatureCache
from frozenprefix.data.cache_format import Fingerprint, Manifest, check_fingerprint, from_storage
from frozenprefix.data.streaming.groups import StreamedGroups
from frozenprefix.errors import CacheError, ConfigError
from frozenprefix.utils.images import StoredImage


class StreamedFeatures:
    """Features of streamed samples, from their own bytes; those of other images from a cache. Read by `Collator`.

    Args:
        manifest: shape and dtype of the streamed features.
        cache: of the images that are not streamed.

    Example:
        >>> StreamedFeatures(Manifest({}, "float16", tokens=1, dim=8), None).manifest.dim
        8
    """

    def __init__(self, manifest: Manifest, cache: FeatureCache | None):
        self.manifest, self.cache = manifest, cache

    def key_of(self, path: Path) -> Any:
        """What `get` takes for an image."""
        if isinstance(path, StoredImage):
            return path
        assert self.cache is not None  # images outside of shards are encoded before
        return self.cache.key_of(path)

    def get(self, keys: Sequence[Any]) -> np.ndarray:
        """float16[n, N, D] of features stored as float16, else float32.

        Raises:
            CacheError: they have another shape than the manifest of the shards says.
        """
        wanted = np.float16 if self.manifest.dtype == "float16" else np.float32
        out = np.empty((len(keys), *self.manifest.shape), wanted)
        for row, key in zip(out, keys, strict=True):
            if isinstance(key, StoredImage):
                scale = self.manifest.features_length
                from_storage(key.data, self.manifest, row, offset=0, scale_offset=scale, where=key)
            else:
                assert self.cache is not None
                row[...] = self.cache.get([key])[0]
        return out


def streamed_features(
    streams: Sequence[StreamedGroups], fingerprint: Fingerprint, cache: FeatureCache | None
) -> StreamedFeatures | None:
    """What reads the features of streams; None for streams of images.

    Args:
        fingerprint: of the recipe's encoder, which features must come from.
        cache: of the images that are not streamed.

    Raises:
        ConfigError: some hold features and others images, or features of several kinds.
        CacheError: the features are of another encoder.
    """
    manifests = [stream.manifest for stream in streams]
    with_features = [manifest for manifest in manifests if manifest is not None]
    if not with_features:
        return None
    first = with_features[0]
    kinds = ["images" if m is None else f"{m.dtype} features [{m.tokens}, {m.dim}]" for m in manifests]
    if len(set(kinds)) > 1:
        raise ConfigError(f"data.train: got streams of {' and '.join(kinds)}, expected all of one kind")
    for stream, manifest in zip(streams, with_features, strict=True):
        check_fingerprint(stream.root, manifest.fingerprint, fingerprint)
    if cache is not None and cache.manifest.shape != first.shape:
        raise CacheError(f"data.train: streamed features are {first.shape}, cached ones {cache.manifest.shape}")
    return StreamedFeatures(first, cache)
