"""Image file → key of its features: the image's bytes decide, not its name or place."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from os import PathLike
from pathlib import Path

from frozenprefix.data.images import read_image

log = logging.getLogger(__name__)

_Stat = tuple[int, int]


def image_key(data: bytes) -> str:
    """SHA-256 of an image file's bytes, first 32 hex digits."""
    return hashlib.sha256(data).hexdigest()[:32]


class ImageKeys:
    """Keys of image files, remembered by path, size and time of change, so that a file is hashed once.

    The memory is a file in the cache folder, one for each writing process; all of them are read. A line that cannot be
    read costs one hashing.
    """

    def __init__(self, folder: Path, rank: int = 0):
        self._file = folder / f"image-keys-r{rank:02d}.jsonl"
        self._known: dict[str, tuple[_Stat, str]] = {}
        self._unsaved: list[str] = []
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
            self._unsaved.append(json.dumps([name, *stat, key]))
        return key, data

    def key_of(self, path: str | PathLike[str]) -> str:
        return self.lookup(path) or self.read(path)[0]

    def save(self) -> None:
        """Append what was learnt since the last time."""
        lines, self._unsaved = self._unsaved, []
        if lines:
            with self._file.open("a", encoding="utf-8") as stream:
                # the first newline ends a line that a killed process left unfinished
                stream.write("\n" + "\n".join(lines) + "\n")

    def _load(self, file: Path) -> None:
        unreadable = 0
        for line in file.read_text(encoding="utf-8", errors="replace").split("\n"):
            if not line:
                continue
            try:
                name, size, changed, key = json.loads(line)
                self._known[name] = ((size, changed), key)
            except (ValueError, TypeError):
                unreadable += 1
        if unreadable:
            log.info("%s: %d unreadable lines; these images are hashed again", file, unreadable)


def _stat(name: str) -> _Stat | None:
    try:
        stat = os.stat(name)
    except OSError:
        return None
    return stat.st_size, stat.st_mtime_ns
