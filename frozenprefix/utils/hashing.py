"""Hashes of files and folders, remembered between runs."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable
from os import PathLike
from pathlib import Path

from frozenprefix.errors import AssetError
from frozenprefix.utils.files import file_state, write_text_atomic
from frozenprefix.utils.user_cache import user_cache

logger = logging.getLogger(__name__)

# Hashing a smaller file costs less than looking its hash up on disk.
_SMALLEST_FILE_TO_REMEMBER = 1 << 20

_hashes: dict[tuple[str, int, int, int], str] = {}


def content_hash(*parts: bytes | str) -> str:
    """SHA-256 in hex of bytes or texts (as UTF-8). With several parts, their boundaries count too.

    Example:
        >>> content_hash("a")[:8], content_hash(b"a")[:8]
        ('ca978112', 'ca978112')
        >>> content_hash("ab", "c") == content_hash("a", "bc")
        False
    """
    data = [part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part for part in parts]
    if len(data) > 1:
        data = [b"%d:%b" % (len(part), part) for part in data]
    return hashlib.sha256(b"".join(data)).hexdigest()


def file_sha256(path: str | PathLike[str]) -> str:
    """SHA-256 of a file, in hex; remembered for as long as its path and its `file_state` stay the same.

    Raises:
        AssetError: `path` is not a file.

    Example:
        >>> _ = (tmp_path / "a.txt").write_text("a")
        >>> file_sha256(tmp_path / "a.txt") == content_hash("a")
        True
    """
    path = Path(path).resolve()
    if not path.is_file():
        raise AssetError(f"cannot hash '{path}': it is not a file")
    key = (str(path), *file_state(path))
    if key not in _hashes:
        remember = key[1] >= _SMALLEST_FILE_TO_REMEMBER
        digest = _remembered_hash(key) if remember else None
        if digest is None:
            digest = hash_file(path)
            if remember:
                _remember_hash(key, digest)
        _hashes[key] = digest
    return _hashes[key]


def tree_sha256(folder: str | PathLike[str], patterns: Iterable[str]) -> str:
    """SHA-256, in hex, over the sorted relative names and the hashes of the files that match one of `patterns`.

    Args:
        folder: for instance a local model folder.
        patterns: glob patterns relative to `folder`: `["*.safetensors", "config.json"]`.

    Raises:
        AssetError: no file matches, which would give every such folder the same hash.

    Example:
        >>> _ = (tmp_path / "config.json").write_text("{}")
        >>> len(tree_sha256(tmp_path, ["*.json"]))
        64
    """
    folder, patterns = Path(folder), list(patterns)
    files = {path.relative_to(folder).as_posix(): path for pattern in patterns for path in folder.glob(pattern)}
    lines = [f"{name}\0{file_sha256(path)}\n" for name, path in sorted(files.items()) if path.is_file()]
    if not lines:
        raise AssetError(f"no file in '{folder}' matches any of {patterns}")
    return content_hash("".join(lines))


def hash_file(path: Path) -> str:
    """SHA-256 of a file, in hex, without remembering it.

    Example:
        >>> _ = (tmp_path / "a.txt").write_text("a")
        >>> hash_file(tmp_path / "a.txt") == content_hash("a")
        True
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _read_hashes() -> dict[str, list]:
    """`path → [size, mtime_ns, ctime_ns, sha256]`. A damaged file counts as empty: hashes can be computed again."""
    try:
        content = json.loads((user_cache() / "hashes.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        logger.warning("the file of remembered hashes cannot be read and is replaced: %s", error)
        return {}
    return content if isinstance(content, dict) else {}


def _remembered_hash(key: tuple[str, int, int, int]) -> str | None:
    match _read_hashes().get(key[0]):
        case [*state, str(digest)] if tuple(state) == key[1:]:
            return digest
    return None


def _remember_hash(key: tuple[str, int, int, int], digest: str) -> None:
    """Add one hash to the file. Of two processes at once one may lose its entry, which only costs a second hashing."""
    hashes = _read_hashes() | {key[0]: [*key[1:], digest]}
    try:
        write_text_atomic(user_cache() / "hashes.json", json.dumps(hashes, indent=0))
    except OSError as error:
        logger.warning("the hash of %s could not be remembered: %s", key[0], error)
