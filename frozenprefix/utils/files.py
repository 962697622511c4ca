"""Atomic writing: a file or folder exists completely or not at all, even after a kill or on a full disk."""

from __future__ import annotations

import os
import re
import shutil
import uuid
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from os import PathLike
from pathlib import Path

from frozenprefix.errors import DataError


@contextmanager
def atomic_file(path: str | PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path next to `path`, and rename it to `path` when the block ends without an exception.

    Missing parent folders are created. An exception in the block leaves `path` as it was. Pipes and devices such as
    /dev/stdout cannot be replaced and are written directly.

    Example:
        >>> with atomic_file(tmp_path / "table.csv") as draft:
        ...     _ = draft.write_text("a,b")
        >>> (tmp_path / "table.csv").read_text()
        'a,b'
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        yield path
        return
    path = path.resolve() if path.is_symlink() else path
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{safe_file_name(path.name, 64)}.{uuid.uuid4().hex}.tmp")
    try:
        yield draft
        _flush(draft)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | PathLike[str], *, replace: bool = True, keep: Path | None = None) -> Iterator[Path]:
    """Yield a new empty folder, and rename it to `path` when the block ends without an exception.

    Args:
        replace: replace an existing folder, which stays until the new one is complete; for a single writer. False: of
            several writers the first one wins, and the folders of the others are deleted.
        keep: with `replace`, where the former folder is moved to; None deletes it.

    Example:
        >>> with atomic_folder(tmp_path / "run") as draft:
        ...     write_text_atomic(draft / "a.txt", "1")
        >>> [file.name for file in (tmp_path / "run").iterdir()]
        ['a.txt']
    """
    path = Path(path)
    old = keep or path.with_name(f".{path.name}.old")
    draft = path.with_name(f".{path.name}.{'new' if replace else uuid.uuid4().hex}")
    if replace:
        recover_folder(path)
        for leftover in (draft, old):
            shutil.rmtree(leftover, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        yield draft
        if replace:
            for file in draft.rglob("*"):
                _flush(file)
            if path.exists():
                path.rename(old)
        try:
            draft.rename(path)
        except OSError:
            if replace or not path.is_dir():
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    if replace and keep is None:
        shutil.rmtree(old, ignore_errors=True)


def recover_folder(path: Path) -> Path:
    """Bring back the former folder when `atomic_folder` was killed between its two renames. Returns `path`.

    Example:
        >>> (tmp_path / ".last.old").mkdir()
        >>> recover_folder(tmp_path / "last").exists()
        True
    """
    old = path.with_name(f".{path.name}.old")
    if not path.exists() and old.exists():
        old.rename(path)
    return path


def write_bytes_atomic(path: str | PathLike[str], data: bytes) -> None:
    """Write a file through `atomic_file`.

    Example:
        >>> write_bytes_atomic(tmp_path / "a.bin", b"1")
        >>> (tmp_path / "a.bin").read_bytes()
        b'1'
    """
    with atomic_file(path) as draft:
        draft.write_bytes(data)


def write_text_atomic(path: str | PathLike[str], text: str) -> None:
    r"""Write UTF-8 text through `atomic_file`, with line ends as they are in `text`.

    Bytes of file names that are not UTF-8, which Python holds as lone surrogates, become `\udcXX`. In JSON that is an
    escape, and reads back as the same name.

    Example:
        >>> write_text_atomic(tmp_path / "a.txt", "caf\u00e9")
        >>> read_text(tmp_path / "a.txt")
        'café'
    """
    write_bytes_atomic(path, encode_text(text))


def encode_text(text: str) -> bytes:
    r"""UTF-8 bytes of a text, with lone surrogates written as `\udcXX`.

    Example:
        >>> encode_text("caf\udce9.jpg")
        b'caf\\udce9.jpg'
    """
    return text.encode("utf-8", errors="backslashreplace")


def read_text(path: str | PathLike[str]) -> str:
    """Read a UTF-8 file, without a byte order mark.

    Raises:
        DataError: the file cannot be read, or is not UTF-8.

    Example:
        >>> write_bytes_atomic(tmp_path / "bom.txt", b"\\xef\\xbb\\xbfa")
        >>> read_text(tmp_path / "bom.txt")
        'a'
    """
    try:
        return Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text (byte {error.start}); convert the file to UTF-8") from error
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}; expected a text file there") from error


def file_state(path: str | PathLike[str]) -> tuple[int, int, int]:
    """Size, time of change of the content, and time of change of the file itself, both in nanoseconds.

    The last one cannot be set: a file that was replaced by one with the same size and date has another state.

    Raises:
        OSError: there is no such file.

    Example:
        >>> before = file_state(tmp_path)
        >>> os.utime(tmp_path, ns=(before[1], before[1]))
        >>> after = file_state(tmp_path)
        >>> before[:2] == after[:2]
        True
    """
    state = os.stat(path)
    return state.st_size, state.st_mtime_ns, state.st_ctime_ns


def safe_file_name(text: str, max_length: int = 80) -> str:
    """Turn any text into one part of a file name that every file system takes.

    What is not a letter, a digit, `.`, `_` or `-` becomes `-`. A longer text is cut, and its CRC-32 added.

    Example:
        >>> safe_file_name("data/flickr 8k")
        'data-flickr-8k'
    """
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.") or "unnamed"
    return name if len(name) <= max_length else f"{name[: max_length - 9]}-{zlib.crc32(encode_text(text)):08x}"


def _flush(path: Path) -> None:
    """Have the operating system write a file to disk, where it can. Folders are passed over."""
    with suppress(OSError), path.open("rb") as file:
        os.fsync(file.fileno())
