"""Writing a feature cache: shard by shard, so that a kill or a full disk costs at most the shard at hand."""

from __future__ import annotations

import errno
import logging
import re
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from os import PathLike, fsync
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, get_args

import numpy as np

from frozenprefix.data.cache_format import (
    FEATURES,
    MANIFEST,
    SCALE,
    Entry,
    Fingerprint,
    Manifest,
    StorageDType,
    check_fingerprint,
    index_path,
    load_index,
    load_manifest,
    plain_fingerprint,
    save_index,
    scan_shard,
    shard_paths,
    to_storage,
)
from frozenprefix.errors import CacheError

log = logging.getLogger(__name__)

_KEY = re.compile(r"[A-Za-z0-9_-]{1,64}")


class FeatureCacheWriter:
    """Adds features to a cache folder; a context manager. What an earlier run finished is kept and can be asked for.

    Args:
        folder: made when it is not there.
        fingerprint: what the features depend on; it must equal that of a cache that is already in the folder.
        dtype: how features are stored.
        images_per_shard: a kill costs at most these.
        rank: number of this process; each writes shards of its own name. One writer a rank at a time.

    Raises:
        CacheError: when the folder holds another cache, or one that is damaged.
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
        self._images_per_shard, self._prefix = images_per_shard, f"features-r{rank:02d}-"
        self._manifest: Manifest | None = None
        self._stream: BinaryIO | None = None
        self._tar: tarfile.TarFile | None = None
        self._entries: dict[str, Entry] = {}
        with self._disk_errors():
            self.folder.mkdir(parents=True, exist_ok=True)
            self._done = self._take_up()

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
        """Store float[B, N, D], one [N, D] for each of B keys. Keys that are there already are passed over.

        Raises:
            CacheError: for a shape that is not the cache's, a value that the dtype cannot hold, a key that cannot be
                a WebDataset key, or a disk that is full. Finished shards stay good.
        """
        if features.ndim != 3 or len(features) != len(keys):
            raise CacheError(f"features: got shape {features.shape} for {len(keys)} keys, expected [{len(keys)}, N, D]")
        for key, rows in zip(keys, features, strict=True):
            if not _KEY.fullmatch(key):
                raise CacheError(f"key: got {key!r}, expected at most 64 letters, digits, '-' and '_'")
            if key not in self:
                self._add_one(key, rows)

    def close(self) -> None:
        """Finish the shard at hand. Nothing happens when there is none."""
        if self._tar is None or self._stream is None:
            return
        shard = self._next_name()
        with self._disk_errors():
            self._tar.close()
            self._stream.flush()
            fsync(self._stream.fileno())
            self._stream.close()
            self._temporary.rename(shard)
            save_index(shard, self._entries)
        self._done.update(self._entries)
        self._tar, self._stream, self._entries = None, None, {}

    @property
    def _temporary(self) -> Path:
        return self.folder / f"{self._prefix}current.tar.tmp"

    def _take_up(self) -> set[str]:
        """Remove what a killed run left unfinished, and return the keys of everything that counts."""
        for left in self.folder.glob(f"{self._prefix}*.tmp"):
            left.unlink()
        if not (self.folder / MANIFEST).exists() and not shard_paths(self.folder):
            return set()
        self._manifest = self._checked(load_manifest(self.folder))
        done: set[str] = set()
        for shard in shard_paths(self.folder):
            if index_path(shard).exists():
                done |= load_index(shard).keys()
            elif shard.name.startswith(self._prefix):  # killed between the two renames; others' may be in the middle
                save_index(shard, scan_shard(shard, self._manifest))
                done |= load_index(shard).keys()
        log.info("%s: %d images are there already", self.folder, len(done))
        return done

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
            self.close()

    def _manifest_for(self, tokens: int, dim: int) -> Manifest:
        if self._manifest is None:
            if not (self.folder / MANIFEST).exists():
                with self._disk_errors():
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
        """Forget the shard at hand and give its space back."""
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
                f"Finished shards stay good; {lost} images of the unfinished one are to be encoded again"
            ) from error
