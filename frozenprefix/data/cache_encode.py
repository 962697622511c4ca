"""Filling a feature cache from image files, with the images decoded in the background."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from frozenprefix.data.cache import FeatureCache
from frozenprefix.data.cache_format import MANIFEST, Fingerprint, StorageDType
from frozenprefix.data.cache_keys import ImageKeys
from frozenprefix.data.cache_writer import FeatureCacheWriter
from frozenprefix.data.images import BadImages, decode_image
from frozenprefix.errors import BadImageError, CacheError

Encode = Callable[[list[Any]], np.ndarray]


@dataclass(frozen=True, slots=True)
class _Prepared:
    """An image on its way to the encoder. No `image`: its features are there already, or `error` says why not."""

    path: Path
    key: str = ""
    image: Any = None
    error: BadImageError | None = None


def encode_images(
    paths: Iterable[str | PathLike[str]],
    encode: Encode,
    folder: str | PathLike[str],
    fingerprint: Fingerprint,
    *,
    dtype: StorageDType = "float16",
    batch_size: int = 32,
    workers: int = 2,
    transform: Callable[[Any], Any] | None = None,
    bad: BadImages | None = None,
    max_bad_share: float = 0.01,
    progress: Callable[[int, int], None] | None = None,
    images_per_shard: int = 500,
    rank: int = 0,
    world_size: int = 1,
    barrier: Callable[[], None] | None = None,
) -> FeatureCache | None:
    """Encode the images whose features are not in the cache yet, and open the cache; None when it is still empty,
    because not one image could be read.

    Images are read, hashed and decoded by threads (Pillow decodes without holding the interpreter's lock), two
    batches ahead of the encoder. Images with the same bytes are encoded once.

    Args:
        paths: image files; repeated ones count once. Every process is given all of them and takes its share.
        encode: list of B images (or of what `transform` made of them) → float[B, N, D].
        folder, fingerprint, dtype, images_per_shard: see `FeatureCacheWriter`.
        batch_size: images given to `encode` at once; the last batch may be smaller.
        workers: decoding threads.
        transform: RGB image → what `encode` takes; done in the threads, so that it costs the encoder no time, and
            images that wait need no more memory than its result.
        bad: takes the images that cannot be read.
        max_bad_share: share of this process's images, 0 to 1, past which the run stops.
        progress: called with (images done, images in all) of this process.
        rank, world_size, barrier: for several processes. `barrier` waits for all of them before the cache is opened.

    Raises:
        DataError: when too many images are bad. What was encoded stays.
        CacheError: as `FeatureCacheWriter` and `FeatureCache.open` do.
    """
    if batch_size < 1 or workers < 1:
        raise CacheError(f"batch_size and workers must be >= 1, got {batch_size} and {workers}")
    bad = BadImages() if bad is None else bad
    unique = list(dict.fromkeys(Path(path) for path in paths))
    mine = unique[rank::world_size]
    with FeatureCacheWriter(folder, fingerprint, dtype=dtype, images_per_shard=images_per_shard, rank=rank) as writer:
        keys = ImageKeys(writer.folder, rank)
        batch: dict[str, Any] = {}
        prepare = _preparation(writer, keys, transform)
        try:
            for done, item in enumerate(_ahead(mine, prepare, workers, 2 * batch_size + workers), start=1):
                if item.error is not None:
                    bad.record(item.path, item.error)
                    bad.check(len(mine), max_bad_share)
                elif item.image is not None and item.key not in writer:
                    batch.setdefault(item.key, item.image)
                if len(batch) == batch_size or (done == len(mine) and batch):
                    _encode_batch(batch, encode, writer)
                    batch = {}
                if progress is not None:
                    progress(done, len(mine))
        finally:
            keys.save()
    if barrier is not None:
        barrier()
    if mine and len(bad) == len(mine) and not (Path(folder) / MANIFEST).exists():
        return None
    return FeatureCache.open(folder, fingerprint)


def _preparation(
    writer: FeatureCacheWriter, keys: ImageKeys, transform: Callable[[Any], Any] | None
) -> Callable[[Path], _Prepared]:
    def prepare(path: Path) -> _Prepared:
        known = keys.lookup(path)
        if known is not None and known in writer:
            return _Prepared(path, known)
        try:
            key, data = keys.read(path)
            if key in writer:
                return _Prepared(path, key)
            image = decode_image(data, path)
        except BadImageError as error:
            return _Prepared(path, error=error)
        return _Prepared(path, key, image if transform is None else transform(image))

    return prepare


def _ahead(paths: list[Path], prepare: Callable[[Path], _Prepared], workers: int, window: int) -> Iterator[_Prepared]:
    """Yield prepared images in order, while up to `window` further ones are being prepared."""
    pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
    pending: deque[Future[_Prepared]] = deque()
    try:
        for path in paths:
            pending.append(pool.submit(prepare, path))
            if len(pending) > window:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _encode_batch(batch: dict[str, Any], encode: Encode, writer: FeatureCacheWriter) -> None:
    features = encode(list(batch.values()))
    if not isinstance(features, np.ndarray) or features.ndim != 3 or len(features) != len(batch):
        got = f"shape {features.shape}" if isinstance(features, np.ndarray) else type(features).__name__
        raise CacheError(f"encode: got {got} for {len(batch)} images, expected a NumPy array [{len(batch)}, N, D]")
    writer.add(list(batch), features)
