"""Reading a feature cache: features of images in WebDataset shards, with an index for random access.

    cache = FeatureCache.open("features", fingerprint)
    features = cache.get([cache.key_of(path) for path in paths])          # float16[n, N, D]

Any WebDataset user reads the same folder with `webdataset.WebDataset(cache.shards).decode()`.
"""

from __future__ import annotations

import logging
import mmap
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from frozenprefix.data.cache_format import (
    MANIFEST,
    REPAIR,
    Entry,
    Fingerprint,
    Manifest,
    check_fingerprint,
    from_storage,
    index_path,
    load_index,
    load_manifest,
    lock_path,
    save_index,
    scan_shard,
    shard_paths,
)
from frozenprefix.data.images import read_image
from frozenprefix.errors import CacheError
from frozenprefix.utils import append_jsonl, content_hash, file_state, hold_lock, read_jsonl, report

log = logging.getLogger(__name__)


class FeatureCache:
    """Features of images by key, read from memory-mapped shards. Built by `FeatureCache.open`.

    Bytes are compared with their checksum when they are read for the first time. A cache can be passed to worker
    processes: each maps the shards itself.

    Example:
        >>> from frozenprefix.data.cache_writer import FeatureCacheWriter
        >>> with FeatureCacheWriter(tmp_path, {"encoder": "vit"}) as writer:
        ...     writer.add(["key"], np.ones((1, 2, 3), np.float32))
        >>> FeatureCache.open(tmp_path).get(["key"]).shape
        (1, 2, 3)
    """

    def __init__(self, folder: Path, manifest: Manifest, places: dict[str, tuple[Path, Entry]], keys: ImageKeys):
        self.folder, self.manifest = folder, manifest
        self._places, self._image_keys = places, keys
        self._maps: dict[Path, mmap.mmap] = {}
        self._checked: set[str] = set()  # keys whose bytes agreed with their checksum

    @classmethod
    def open(cls, folder: str | PathLike[str], fingerprint: Fingerprint | None = None) -> FeatureCache:
        """Open a cache for reading.

        Args:
            folder: of the cache.
            fingerprint: encoder and preprocessing that the features must come from; None opens any cache.

        Raises:
            CacheError: for another fingerprint, naming the first field that differs; for a shard that is truncated or
                whose index is missing or damaged.
        """
        folder = Path(folder)
        manifest = load_manifest(folder)
        if fingerprint is not None:
            check_fingerprint(folder, manifest.fingerprint, fingerprint)
        places = {key: (shard, entry) for shard in shard_paths(folder) for key, entry in load_index(shard).items()}
        for key, (shard, entry) in places.items():
            if entry.length != manifest.features_length:
                raise CacheError(f"{shard}: the features of {key} are not of the shape that {MANIFEST} names; {REPAIR}")
        return cls(folder, manifest, places, ImageKeys(folder))

    @property
    def tokens(self) -> int:
        """N: feature vectors an image."""
        return self.manifest.tokens

    @property
    def dim(self) -> int:
        """D: width of a feature vector."""
        return self.manifest.dim

    @property
    def fingerprint(self) -> Fingerprint:
        return self.manifest.fingerprint

    @property
    def shards(self) -> list[str]:
        """The tar files, for `webdataset.WebDataset`."""
        return [str(path) for path in shard_paths(self.folder)]

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: object) -> bool:
        return key in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def key_of(self, path: str | PathLike[str]) -> str:
        """Key of an image file, whether or not its features are there. Hashed once, then remembered.

        Raises:
            BadImageError: `missing`, `empty` or `unreadable`.
        """
        return self._image_keys.key_of(path)

    def keys_of(self, paths: Iterable[str | PathLike[str]]) -> list[str]:
        """Keys of many image files, remembered for the next run."""
        keys = [self.key_of(path) for path in paths]
        try:
            self._image_keys.save()
        except OSError as error:
            log.info("%s: keys are not remembered, the folder cannot be written (%s)", self.folder, error)
        return keys

    def get(self, keys: Sequence[str]) -> np.ndarray:
        """Features of images, in the order of `keys`: a new array [n, N, D].

        The dtype is float16 for a cache stored as float16, and float32 for bfloat16 and int8.

        Raises:
            CacheError: for a key without features, and for damaged bytes.
        """
        # NumPy casts to float16 so slowly (15 ms for 64 images of 49 x 1280) that it would be most of the work
        wanted = np.float16 if self.manifest.dtype == "float16" else np.float32
        out = np.empty((len(keys), *self.manifest.shape), wanted)
        for row, key in enumerate(keys):
            place = self._places.get(key)
            if place is None:
                missing = sum(other not in self._places for other in keys)
                raise CacheError(
                    f"{self.folder}: no features for key {key}, {missing} of {len(keys)} are missing; encode"
                )
            self._read_into(out[row], key, *place)
        return out

    def verify(self) -> None:
        """Read everything and compare it with the checksums; `CacheError` names the first image that differs."""
        for key, (shard, entry) in self._places.items():
            self._check(key, shard, entry)

    def _check(self, key: str, shard: Path, entry: Entry) -> None:
        mapped = memoryview(self._map(shard))
        crc = zlib.crc32(mapped[entry.offset : entry.offset + entry.length])
        if self.manifest.dtype == "int8":
            crc = zlib.crc32(mapped[entry.scale_offset : entry.scale_offset + self.manifest.scale_length], crc)
        if crc != entry.crc32:
            raise CacheError(f"{shard}: the features of {key} are damaged; {REPAIR}")
        self._checked.add(key)

    def _read_into(self, out: np.ndarray, key: str, shard: Path, entry: Entry) -> None:
        mapped = self._map(shard)
        if key not in self._checked:
            self._check(key, shard, entry)
        from_storage(
            mapped, self.manifest, out, offset=entry.offset, scale_offset=entry.scale_offset, where=self.folder
        )

    def _map(self, shard: Path) -> mmap.mmap:
        if shard not in self._maps:
            with shard.open("rb") as stream:
                self._maps[shard] = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        return self._maps[shard]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}


def repair_cache(folder: str | PathLike[str]) -> int:
    """Rebuild the indexes from the shards. Returns the number of images whose features are good.

    A damaged shard is renamed to `.damaged`; the next run encodes its images again.

    Raises:
        CacheError: the manifest is missing, so that the features' encoder is unknown.
        LockError: another process is writing to the cache.

    Example:
        >>> from frozenprefix.data.cache_writer import FeatureCacheWriter
        >>> with FeatureCacheWriter(tmp_path, {"encoder": "vit"}) as writer:
        ...     writer.add(["key"], np.ones((1, 2, 3), np.float32))
        >>> repair_cache(tmp_path)
        1
    """
    folder = Path(folder)
    manifest = load_manifest(folder)
    ranks = {path.name.split("-")[1].partition(".")[0] for path in folder.glob("*-r*") if "-r" in path.name}
    with ExitStack() as locks:
        for rank in sorted(ranks):
            locks.enter_context(hold_lock(lock_path(folder, rank), f"feature cache '{folder}'"))
        for index in folder.glob("features-*.index.json"):
            if not index.with_name(index.name.removesuffix(".index.json") + ".tar").exists():
                index.unlink()
        return sum(_repair_shard(shard, manifest) for shard in shard_paths(folder))


def _repair_shard(shard: Path, manifest: Manifest) -> int:
    """Rebuild the index of a shard, or set the shard aside. Returns the number of good images."""
    try:
        entries = scan_shard(shard, manifest)
        _check_against_index(shard, entries)
    except CacheError as error:
        log.warning("set aside: %s", error)
        index_path(shard).unlink(missing_ok=True)
        shard.rename(shard.with_suffix(".tar.damaged"))
        return 0
    save_index(shard, shard.stat().st_size, entries)
    return len(entries)


def _check_against_index(shard: Path, entries: dict[str, Entry]) -> None:
    """Compare with the checksums of the old index, if it can still be read: they are from the time of writing."""
    try:
        before = load_index(shard, any_size=True)
    except CacheError as error:
        log.info("%s", error)
        return
    for key, entry in before.items():
        if entries.get(key) != entry:
            raise CacheError(f"{shard}: the features of {key} are not those that were written")


def image_key(data: bytes) -> str:
    """Key of an image: SHA-256 of its file's bytes, first 32 hex digits. The name and the folder play no part.

    Example:
        >>> image_key(b"image")[:8]
        '6105d6cc'
    """
    return content_hash(data)[:32]


class ImageKeys:
    """Keys of image files, remembered by path and `file_state`, so that a file is hashed once.

    They are kept in files in the cache folder, one for each writing process; all of them are read. A line that cannot
    be read costs one hashing.

    Example:
        >>> keys = ImageKeys(tmp_path)
        >>> keys.key_of(image_path) == image_key(read_image(image_path))
        True
    """

    def __init__(self, folder: Path, rank: int = 0):
        self._file = folder / f"image-keys-r{rank:02d}.jsonl"
        self._known: dict[str, tuple[tuple[int, int, int], str]] = {}
        self._unsaved: list[list[Any]] = []
        for file in sorted(folder.glob("image-keys-r*.jsonl")):
            self._load(file)

    def lookup(self, path: str | PathLike[str]) -> str | None:
        """The key of a file that has not changed since it was hashed, else None."""
        name = os.path.abspath(path)
        remembered = self._known.get(name)
        return remembered[1] if remembered is not None and remembered[0] == _stat(name) else None

    def read(self, path: str | PathLike[str]) -> tuple[str, bytes]:
        """Read a file and remember its key. Returns key and bytes.

        Raises:
            BadImageError: `missing`, `empty` or `unreadable`.
        """
        name = os.path.abspath(path)
        stat = _stat(name)  # before reading: a file that changes meanwhile is hashed again next time
        data = read_image(path)
        key = image_key(data)
        if stat is not None:
            self._known[name] = (stat, key)
            self._unsaved.append([name, *stat, key])
        return key, data

    def key_of(self, path: str | PathLike[str]) -> str:
        return self.lookup(path) or self.read(path)[0]

    def save(self) -> None:
        """Append the keys that were computed since the last time."""
        rows, self._unsaved = self._unsaved, []
        if rows:
            append_jsonl(self._file, rows)

    def _load(self, file: Path) -> None:
        without = []
        total = 0
        for number, row in read_jsonl(file, skip_damaged=True):
            total += 1
            try:
                name, size, changed, replaced, key = row
                self._known[name] = ((size, changed, replaced), key)
            except (ValueError, TypeError):
                without.append(f"line {number}")
        reasons = {"no key; their images are hashed again": len(without)}
        report(file, total, reasons, what="lines", examples=without, level=logging.INFO)


def _stat(name: str) -> tuple[int, int, int] | None:
    try:
        return file_state(name)
    except OSError:
        return None
