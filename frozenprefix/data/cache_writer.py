"""Writing a feature cache shard by shard, so that a kill or a full disk costs at most the unfinished shard."""

from __future__ import annotations

import errno
import logging
import re
import tarfile
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from io import BytesIO
from os import PathLike, fsync
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, get_args

import numpy as np

from frozenprefix.data.cache import FeatureCache, ImageKeys
from frozenprefix.data.cache_format import (
    FEATURES,
    MANIFEST,
    SCALE,
    Entry,
    Fingerprint,
    Manifest,
    StorageDType,
    check_fingerprint,
    load_index,
    load_manifest,
    lock_path,
    plain_fingerprint,
    save_index,
    shard_paths,
    to_storage,
)
from frozenprefix.data.images import BadImages, decode_image, processing
from frozenprefix.errors import BadImageError, CacheError
from frozenprefix.utils import hold_lock

log = logging.getLogger(__name__)

_KEY = re.compile(r"[A-Za-z0-9_-]{1,64}")


class FeatureCacheWriter:
    """Adds features to a cache folder; a context manager. Features of earlier runs are kept.

    Args:
        folder: created when it does not exist.
        fingerprint: what the features depend on; it must equal that of an existing cache in the folder.
        dtype: of the stored features.
        images_per_shard: at most this many images are lost if the process is killed.
        rank: number of this process; each writes shards of its own name. Before its first shard a writer waits for
            another one of its rank to finish, and then skips what that one stored.

    Raises:
        CacheError: the folder holds a cache with another fingerprint, or a damaged one.

    Example:
        >>> with FeatureCacheWriter(tmp_path, {"encoder": "vit"}) as writer:
        ...     writer.add(["key"], np.ones((1, 2, 3), np.float32))
        ...     "key" in writer
        True
    """

    def __init__(
        self,
        folder: str | PathLike[str],
        fingerprint: Fingerprint,
        *,
        dtype: StorageDType = "float16",
        images_per_shard: int = 500,
        rank: int = 0,
    ):
        if dtype not in get_args(StorageDType):
            raise CacheError(f"dtype: got {dtype!r}, expected one of {', '.join(get_args(StorageDType))}")
        if images_per_shard < 1:
            raise CacheError(f"images_per_shard must be >= 1, got {images_per_shard}")
        self.folder = Path(folder)
        self._fingerprint, self._dtype = plain_fingerprint(fingerprint), dtype
        self._images_per_shard, self._rank = images_per_shard, f"r{rank:02d}"
        self._prefix, self._lock = f"features-{self._rank}-", ExitStack()
        self._manifest: Manifest | None = None
        self._stream: BinaryIO | None = None
        self._tar: tarfile.TarFile | None = None
        self._entries: dict[str, Entry] = {}
        self._writes = False
        with self._disk_errors():
            self.folder.mkdir(parents=True, exist_ok=True)
            self._done = self._stored()

    def __contains__(self, key: object) -> bool:
        return key in self._done or key in self._entries

    def __len__(self) -> int:
        return len(self._done) + len(self._entries)

    def __enter__(self) -> FeatureCacheWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def add(self, keys: Sequence[str], features: np.ndarray) -> None:
        """Store float[B, N, D], one [N, D] for each of B keys. Keys that exist already are skipped.

        Raises:
            CacheError: for another shape than before, a value that the dtype cannot hold, a key that is not a valid
                WebDataset key, or a full disk. Finished shards stay valid.
        """
        if features.ndim != 3 or len(features) != len(keys):
            raise CacheError(f"features: got shape {features.shape} for {len(keys)} keys, expected [{len(keys)}, N, D]")
        for key, rows in zip(keys, features, strict=True):
            if not _KEY.fullmatch(key):
                raise CacheError(f"key: got {key!r}, expected at most 64 letters, digits, '-' and '_'")
            if key not in self and not self._writes:
                self._begin()
            if key not in self:
                self._add_one(key, rows)

    def close(self) -> None:
        """Finish the current shard, if there is one, and let other writers write."""
        with self._lock:
            self._writes = False
            self._finish_shard()

    def _finish_shard(self) -> None:
        if self._tar is None or self._stream is None:
            return
        shard = self._next_name()
        with self._disk_errors():
            self._tar.close()
            self._stream.flush()
            fsync(self._stream.fileno())
            self._stream.close()
            save_index(shard, self._temporary.stat().st_size, self._entries)
            self._temporary.rename(shard)
        self._done.update(self._entries)
        self._tar, self._stream, self._entries = None, None, {}

    @property
    def _temporary(self) -> Path:
        return self.folder / f"{self._prefix}current.tar.tmp"

    def _stored(self) -> set[str]:
        """The keys of all finished shards."""
        if not (self.folder / MANIFEST).exists() and not shard_paths(self.folder):
            return set()
        self._manifest = self._checked(load_manifest(self.folder))
        done = {key for shard in shard_paths(self.folder) for key in load_index(shard)}
        log.info("%s: already holds features of %d images", self.folder, len(done))
        return done

    def _begin(self) -> None:
        """Become the one writer of this rank, and remove what a killed one left unfinished."""
        with self._disk_errors():
            self._lock.enter_context(
                hold_lock(lock_path(self.folder, self._rank), f"feature cache '{self.folder}'", wait=True)
            )
            self._writes = True
            for left in self.folder.glob(f"{self._prefix}*.tmp"):
                left.unlink()
            for index in self.folder.glob(f"{self._prefix}*.index.json"):
                if not index.with_name(index.name.removesuffix(".index.json") + ".tar").exists():
                    index.unlink()
            self._done = self._stored()

    def _checked(self, manifest: Manifest) -> Manifest:
        check_fingerprint(self.folder, manifest.fingerprint, self._fingerprint)
        if manifest.dtype != self._dtype:
            raise CacheError(
                f"{self.folder}: storage dtype differs: the cache has {manifest.dtype}, expected {self._dtype}; "
                "encode into another folder, or delete this one"
            )
        return manifest

    def _add_one(self, key: str, rows: np.ndarray) -> None:
        stored, scale = to_storage(rows, self._dtype, key)
        manifest = self._manifest_for(rows.shape[0], rows.shape[1])
        data = manifest.features_header + stored.tobytes()
        crc, scale_offset = zlib.crc32(data), 0
        complete = False
        try:
            with self._disk_errors():
                offset = self._append(f"{key}.{FEATURES}", data)
                if scale is not None:
                    scale_data = manifest.scale_header + scale.tobytes()
                    crc, scale_offset = zlib.crc32(scale_data, crc), self._append(f"{key}.{SCALE}", scale_data)
            complete = True
        finally:
            if not complete:  # interrupted in the middle of an image
                self._give_up_shard()
        self._entries[key] = Entry(offset, len(data), crc, scale_offset)
        if len(self._entries) >= self._images_per_shard:
            self._finish_shard()

    def _manifest_for(self, tokens: int, dim: int) -> Manifest:
        if self._manifest is None:
            with self._disk_errors(), hold_lock(self.folder / ".manifest.lock", f"'{self.folder}'", wait=True):
                if not (self.folder / MANIFEST).exists():
                    Manifest(self._fingerprint, self._dtype, tokens, dim).save(self.folder)
            # read back: another process may have been first
            self._manifest = self._checked(load_manifest(self.folder))
        if self._manifest.shape != (tokens, dim):
            raise CacheError(
                f"features: got [{tokens}, {dim}] an image, expected {list(self._manifest.shape)} as before"
            )
        return self._manifest

    def _append(self, name: str, data: bytes) -> int:
        if self._tar is None or self._stream is None:
            self._stream = self._temporary.open("wb")
            self._tar = tarfile.TarFile(fileobj=self._stream, mode="w", format=tarfile.USTAR_FORMAT)
        member = tarfile.TarInfo(name)
        member.size = len(data)
        offset = self._tar.offset + tarfile.BLOCKSIZE  # USTAR: one block of header
        self._tar.addfile(member, BytesIO(data))
        return offset

    def _next_name(self) -> Path:
        numbers = [int(path.stem.rpartition("-")[2]) for path in self.folder.glob(f"{self._prefix}*.tar")]
        return self.folder / f"{self._prefix}{max(numbers, default=0) + 1:06d}.tar"

    def _give_up_shard(self) -> None:
        """Drop the current shard and free its space."""
        if self._stream is not None:
            try:
                self._stream.close()  # flushes, and so may fail once more for the same reason
            except OSError as error:
                log.debug("closing the unfinished shard: %s", error)
        self._temporary.unlink(missing_ok=True)
        self._tar, self._stream, self._entries = None, None, {}

    @contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            lost = len(self._entries)
            self._give_up_shard()
            full = "the disk is full; make room" if error.errno == errno.ENOSPC else "make the folder writable"
            raise CacheError(
                f"{self.folder}: cannot write ({error.strerror or error}): {full} and run again. "
                f"Finished shards stay good; {lost} images of the unfinished one must be encoded again"
            ) from error


Encode = Callable[[list[Any]], np.ndarray]


@dataclass(frozen=True, slots=True)
class _Prepared:
    """An image for the encoder. `image` is None if its features exist, or if it could not be read (`error`)."""

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
    """Encode the images that have no features in the cache yet, and open the cache; None when no image can be read.

    Images are read, hashed and decoded by threads (Pillow decodes without holding the interpreter's lock), two
    batches ahead of the encoder. Images with the same bytes are encoded once.

    Args:
        paths: image files; repeated ones count once. Every process gets all of them and takes its share.
        encode: list of B images (or of the results of `transform`) → float[B, N, D].
        folder, fingerprint, dtype, images_per_shard: see `FeatureCacheWriter`.
        batch_size: images per call of `encode`; the last batch may be smaller.
        workers: decoding threads.
        transform: RGB image → input of `encode`; runs in the threads, so that the encoder does not wait, and waiting
            images need no more memory than its result.
        bad: collects the images that cannot be read.
        max_bad_share: share of this process's images, 0 to 1; with more bad ones the run stops.
        progress: called with (images done, images in total) of this process.
        rank, world_size, barrier: for several processes. `barrier` waits for all of them before the cache is opened.

    Raises:
        DataError: too many images are bad. Features that were encoded stay.
        CacheError: as `FeatureCacheWriter` and `FeatureCache.open`.

    Example:
        >>> def encode(images):
        ...     return np.stack([np.asarray(image.resize((2, 2)), np.float32)[0] for image in images])
        >>> len(encode_images([image_path], encode, tmp_path / "cache", {"encoder": "two pixels"}))
        1
    """
    if batch_size < 1 or workers < 1:
        raise CacheError(f"batch_size and workers must be >= 1, got {batch_size} and {workers}")
    bad = BadImages() if bad is None else bad
    unique = list(dict.fromkeys(path if isinstance(path, Path) else Path(path) for path in paths))
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
            with processing(path):
                prepared = image if transform is None else transform(image)
        except BadImageError as error:
            return _Prepared(path, error=error)
        return _Prepared(path, key, prepared)

    return prepare


def _ahead(paths: list[Path], prepare: Callable[[Path], _Prepared], workers: int, window: int) -> Iterator[_Prepared]:
    """Yield prepared images in order, while up to `window` others are being prepared."""
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
