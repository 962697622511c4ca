"""Samples from tars, each with one read."""

from __future__ import annotations

import os
import tarfile
import weakref
import zlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from frozenprefix.data.cache_format import FEATURES, MANIFEST, SCALE, load_manifest
from frozenprefix.data.samples import Sample
from frozenprefix.data.streaming.groups import StreamedGroups
from frozenprefix.data.streaming.index import ENTRY, TarIndex, ensure_indexes, indexed, members_of
from frozenprefix.data.streaming.remote import RemoteShards
from frozenprefix.errors import BadImageError, DataError
from frozenprefix.utils import content_hash
from frozenprefix.utils.images import StoredImage, image_endings
from frozenprefix.utils.processes import current_processes

_OPEN = 64  # tars that a process keeps open
_OPEN_REMOTE = 4  # a file that is removed keeps its space for as long as it is open


class TarGroups(StreamedGroups):
    """The samples of tars in img2dataset's layout, with images or with features (`KEY.features.npy`) of them.

    Args:
        root: folder of the tars, with the manifest of the features if they hold features.
        tars: in a fixed order.
        block: images that are shuffled together.
        samples: a tar, key, members and images (or features) → the samples of the key.
        finish: see `StreamedGroups`.
        remote: where the tars are fetched from.

    Raises:
        DataError: a tar cannot be read, or does not fit its index.
    """

    def __init__(
        self,
        root: Path,
        tars: Sequence[Path],
        block: int,
        samples: Callable[[Path, str, dict[str, bytes], dict[str, Path]], list[Sample]],
        finish: Callable[[Sample], Sample],
        remote: RemoteShards | None = None,
    ):
        processes = current_processes()
        rank, count = processes.process_index, processes.num_processes
        if remote is None:
            ensure_indexes(tars, rank=rank, processes=count)
        else:
            remote.prepare(rank, count)
        processes.wait_for_everyone()
        self._indexes, self._remote = indexed(tars, remote=remote is not None), remote
        names = [tar.relative_to(root).with_suffix("").as_posix() for tar in tars]
        super().__init__(root, names, [index.samples for index in self._indexes], block, finish)
        self._samples = samples
        self._open: OrderedDict[int, tuple[int, int]] = OrderedDict()
        weakref.finalize(self, _close, self._open)
        if (root / MANIFEST).is_file():
            self.manifest = load_manifest(root)

    def content(self) -> str:
        return content_hash(*(f"{index.bytes} {index.crc32}" for index in self._indexes))

    def read(self, shard: int, row: int) -> list[Sample]:
        index = self._indexes[shard]
        tar_file, index_file = self._files(shard)
        offset, length, crc = ENTRY.unpack(os.pread(index_file, ENTRY.size, index.start + row * ENTRY.size))
        span = os.pread(tar_file, length, offset)
        if zlib.crc32(span) != crc:
            raise BadImageError("damaged", f"{index.tar}: the bytes of sample {row} are not those that were indexed")
        try:
            key, members = members_of(span, index.rule)
        except tarfile.TarError as error:
            raise BadImageError("damaged", f"{index.tar}: sample {row} is not in a tar's format ({error})") from error
        return self._samples(index.tar, key, members, self._images(index.tar, key, members))

    def _images(self, tar: Path, key: str, members: dict[str, bytes]) -> dict[str, Path]:
        if FEATURES in members:
            if self.manifest is None:
                raise DataError(f"{tar}: holds features, but {MANIFEST} beside it is missing; build the shards again")
            return {FEATURES: StoredImage.of(f"{tar}/{key}.{FEATURES}", members[FEATURES] + members.get(SCALE, b""))}
        endings = image_endings()
        return {
            name: StoredImage.of(f"{tar}/{key}.{name}", data)
            for name, data in members.items()
            if f".{name.rpartition('.')[2]}" in endings
        }

    def _files(self, shard: int) -> tuple[int, int]:
        """Descriptors of tar and index. They are read at given places only, so that forked workers may share them."""
        kept = self._open.get(shard)
        if kept is not None:
            self._open.move_to_end(shard)
            return kept
        index: TarIndex = self._indexes[shard]
        index.check_entries()
        if self._remote is not None:
            self._remote.fetch(index.tar)
        try:
            opened = os.open(index.tar, os.O_RDONLY), os.open(index.path, os.O_RDONLY)
        except OSError as error:
            raise DataError(f"{index.tar}: {error.strerror or error}; it was there when the run began") from error
        self._open[shard] = opened
        if len(self._open) > (_OPEN if self._remote is None else _OPEN_REMOTE):
            for descriptor in self._open.popitem(last=False)[1]:
                os.close(descriptor)
        return opened

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        weakref.finalize(self, _close, self._open)


def _close(opened: OrderedDict[int, tuple[int, int]]) -> None:
    for descriptors in opened.values():
        for descriptor in descriptors:
            os.close(descriptor)
