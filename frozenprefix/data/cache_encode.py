"""Filling a feature cache from picture files, with the pictures decoded in the background."""

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
from frozenprefix.data.cache_keys import PictureKeys
from frozenprefix.data.cache_writer import FeatureCacheWriter
from frozenprefix.data.images import BadPictures, decode_image
from frozenprefix.errors import BadImageError, CacheError

Encode = Callable[[list[Any]], np.ndarray]


@dataclass(frozen=True, slots=True)
class _Prepared:
    """A picture on its way to the encoder. No `picture`: its features are there already, or `error` says why not."""

    path: Path
    key: str = ""
    picture: Any = None
    error: BadImageError | None = None


def encode_pictures(
    paths: Iterable[str | PathLike[str]],
    encode: Encode,
    folder: str | PathLike[str],
    fingerprint: Fingerprint,
    *,
    dtype: StorageDType = "float16",
    batch_size: int = 32,
    workers: int = 2,
    transform: Callable[[Any], Any] | None = None,
    bad: BadPictures | None = None,
    max_bad_share: float = 0.01,
    progress: Callable[[int, int], None] | None = None,
    pictures_per_shard: int = 500,
    rank: int = 0,
    world_size: int = 1,
    barrier: Callable[[], None] | None = None,
) -> FeatureCache | None:
    """Encode the pictures whose features are not in the cache yet, and open the cache; None when it is still empty,
    because not one picture could be read.

    Pictures are read, hashed and decoded by threads (Pillow decodes without holding the interpreter's lock), two
    batches ahead of the encoder. Pictures with the same bytes are encoded once.

    Args:
        paths: picture files; repeated ones count once. Every process is given all of them and takes its share.
        encode: list of B pictures (or of what `transform` made of them) → float[B, N, D].
        folder, fingerprint, dtype, pictures_per_shard: see `FeatureCacheWriter`.
        batch_size: pictures given to `encode` at once; the last batch may be smaller.
        workers: decoding threads.
        transform: RGB picture → what `encode` takes; done in the threads, so that it costs the encoder no time, and
            pictures that wait need no more memory than its result.
        bad: takes the pictures that cannot be read.
        max_bad_share: share of this process's pictures, 0 to 1, past which the run stops.
        progress: called with (pictures done, pictures in all) of this process.
        rank, world_size, barrier: for several processes. `barrier` waits for all of them before the cache is opened.

    Raises:
        DataError: when too many pictures are bad. What was encoded stays.
        CacheError: as `FeatureCacheWriter` and `FeatureCache.open` do.
    """
    if batch_size < 1 or workers < 1:
        raise CacheError(f"batch_size and workers must be >= 1, got {batch_size} and {workers}")
    bad = BadPictures() if bad is None else bad
    unique = list(dict.fromkeys(Path(path) for path in paths))
    mine = unique[rank::world_size]
    with FeatureCacheWriter(
        folder, fingerprint, dtype=dtype, pictures_per_shard=pictures_per_shard, rank=rank
    ) as writer:
        keys = PictureKeys(writer.folder, rank)
        batch: dict[str, Any] = {}
        prepare = _preparation(writer, keys, transform)
        try:
            for done, item in enumerate(_ahead(mine, prepare, workers, 2 * batch_size + workers), start=1):
                if item.error is not None:
                    bad.record(item.path, item.error)
                    bad.check(len(mine), max_bad_share)
                elif item.picture is not None and item.key not in writer:
                    batch.setdefault(item.key, item.picture)
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
    writer: FeatureCacheWriter, keys: PictureKeys, transform: Callable[[Any], Any] | None
) -> Callable[[Path], _Prepared]:
    def prepare(path: Path) -> _Prepared:
        known = keys.lookup(path)
        if known is not None and known in writer:
            return _Prepared(path, known)
        try:
            key, data = keys.read(path)
            if key in writer:
                return _Prepared(path, key)
            picture = decode_image(data, path)
        except BadImageError as error:
            return _Prepared(path, error=error)
        return _Prepared(path, key, picture if transform is None else transform(picture))

    return prepare


def _ahead(paths: list[Path], prepare: Callable[[Path], _Prepared], workers: int, window: int) -> Iterator[_Prepared]:
    """Yield prepared pictures in order, while up to `window` further ones are being prepared."""
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
        raise CacheError(f"encode: got {got} for {len(batch)} pictures, expected a NumPy array [{len(batch)}, N, D]")
    writer.add(list(batch), features)
