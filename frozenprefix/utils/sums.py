"""The sizes and SHA-256 sums of a folder's files, kept in the folder and compared when it is read."""

from __future__ import annotations

import json
from collections.abc import Collection
from os import PathLike
from pathlib import Path

from frozenprefix.errors import CheckpointError, DataError
from frozenprefix.utils.files import read_text, write_text_atomic
from frozenprefix.utils.hashing import hash_file
from frozenprefix.utils.jsonl import parse_json

SUMS_FILE = "sums.json"
MOST_CHARACTERS = 250  # of a name; with longer ones the system raises errors


def write_sums(folder: str | PathLike[str], *, leave_out: Collection[str] = ()) -> None:
    """Write `sums.json` with the size and SHA-256 of every file of a folder that is complete.

    Args:
        leave_out: names of folders in it.

    Example:
        >>> _ = (tmp_path / "a.txt").write_text("a")
        >>> write_sums(tmp_path)
        >>> check_sums(tmp_path)
    """
    folder = Path(folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SUMS_FILE)
    sums = {
        path.relative_to(folder).as_posix(): [path.stat().st_size, hash_file(path)]
        for path in files
        if path.relative_to(folder).parts[0] not in leave_out
    }
    write_text_atomic(folder / SUMS_FILE, json.dumps(sums, indent=1))


def check_sums(folder: str | PathLike[str], *, required: bool = False) -> None:
    """Compare a folder's files with its `sums.json`; files that are not listed there do not matter.

    Args:
        required: refuse a folder without sums, instead of leaving it unchecked.

    Raises:
        CheckpointError: naming the first file that is missing or has changed.

    Example:
        >>> _ = (tmp_path / "a.txt").write_text("a")
        >>> write_sums(tmp_path)
        >>> _ = (tmp_path / "a.txt").write_text("b")
        >>> check_sums(tmp_path)
        Traceback (most recent call last):
        frozenprefix.errors.CheckpointError: ...: a.txt has changed since it was written (another SHA-256 than ...
    """
    folder = Path(folder)
    if not (folder / SUMS_FILE).exists():
        if required:
            raise CheckpointError(f"{folder}: holds no {SUMS_FILE}, so it is not known to be whole")
        return
    try:
        sums = {str(name): (int(size), str(digest)) for name, (size, digest) in _read(folder).items()}
    except (DataError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder}: {SUMS_FILE} is damaged ({error}); {_FIX}") from error
    for name, (size, digest) in sums.items():
        path = folder / name
        if len(name) > MOST_CHARACTERS or not path.is_file():
            raise CheckpointError(f"{folder}: {name} is missing; {_FIX}")
        found = path.stat().st_size
        if found != size:
            raise CheckpointError(f"{folder}: {name} has {found} bytes, expected {size}; {_FIX}")
        if hash_file(path) != digest:
            raise CheckpointError(
                f"{folder}: {name} has changed since it was written (another SHA-256 than in {SUMS_FILE}); {_FIX}"
            )


_FIX = f"take another checkpoint; if you changed the file yourself, remove {SUMS_FILE}"


def _read(folder: Path) -> dict:
    return parse_json(read_text(folder / SUMS_FILE))
